"""Prints what importing a module changed in transformers. A script: it must be able to look before kvik is imported.

python registries.py MODULE
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from typing import Any

LOOKED_AT = (
    "transformers.cache_utils",
    "transformers.masking_utils",
    "transformers.modeling_utils",
    "transformers.generation.utils",
    "transformers.generation.candidate_generator",
    "transformers.integrations.sdpa_attention",
    "torch.nn.functional",
)
MODELS = ("LlamaForCausalLM", "Gemma2ForCausalLM", "BloomForCausalLM", "T5ForConditionalGeneration")


def snapshot() -> dict[str, Any]:
    """Every name in those modules, in their classes, and in their registries."""
    found: dict[str, Any] = {}
    models = [getattr(importlib.import_module("transformers"), name).__module__ for name in MODELS]
    for name in (*LOOKED_AT, *models):
        module = importlib.import_module(name)
        for key, value in vars(module).items():
            found[f"{name}.{key}"] = value
            if isinstance(value, type) and value.__module__ == name:
                found |= {f"{name}.{key}.{part}": kept for part, kept in vars(value).items() if part[:5] != "_abc_"}
            if key.isupper() and isinstance(value, Mapping):
                same = {part: value[part] for part in value if value[part] is value[part]}  # some make one at each look
                found |= {f"{name}.{key}[{part}]": kept for part, kept in same.items()}
    return found


def main() -> None:
    """Looks, imports, looks again."""
    before = snapshot()
    importlib.import_module(sys.argv[1])
    after = snapshot()
    changed = [key for key, value in after.items() if key not in before or before[key] is not value]
    changed += [key for key in before if key not in after]
    print(", ".join(changed[:4]))


if __name__ == "__main__":
    main()

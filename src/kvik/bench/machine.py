"""What a machine and an installation have, and what of it costs speed, as data. `bench/examination.py` finds it out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from kvik.bench.processor import Processor
from kvik.bench.spread import Spread

OPS, ISA = "KVIK_OPS", "KVIK_ISA"
SPINS, POLICY, COUNT = "GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS"
VARIABLES = (OPS, ISA, SPINS, POLICY, COUNT)
STOLEN = 0.02  # a larger share of the processors' time that went to other guests is told
NOT_BUILT = (
    "the native kernels were not built, so plain torch is used, several times slower; "
    "install a C++ compiler, such as g++, and install kvik again"
)


@dataclass(frozen=True)
class Versions:
    """Of what computes."""

    kvik: str
    python: str
    torch: str
    transformers: str


@dataclass(frozen=True)
class Kernels:
    """The C++ kernels, and what serves what.

    Attributes:
        path: of the module; None where it was not built.
        isa: the instruction set in use; None where the kernels are not.
        built: instruction sets that were compiled, worst first.
        available: those of them that this processor has.
        rows: what appends and attends on a CPU: native or reference.
        products: what multiplies with int8 and int4 weights: native or torch packed.
    """

    path: str | None
    isa: str | None
    built: tuple[str, ...]
    available: tuple[str, ...]
    rows: str
    products: str


@dataclass(frozen=True)
class Threads:
    """
    Attributes:
        kernels: threads of kvik's own pool, the caller's included; None where the kernels were not built.
        spin: microseconds that an idle one of them looks for work before it sleeps; None likewise.
        torch: threads that torch computes with.
    """

    kernels: int | None
    spin: int | None
    torch: int


@dataclass(frozen=True)
class Setting:
    """An environment variable that speed depends on.

    Attributes:
        name: of it.
        value: None where it is not set.
        by: "you", or "kvik" where the command set it for itself; "" where it is not set.
    """

    name: str
    value: str | None
    by: str

    @property
    def meaning(self) -> str:
        """In a few words."""
        value = (self.value or "").lower()
        if self.name == OPS:
            chosen = {"": "the kernels where they were built", "reference": "plain torch"}
            return chosen.get(value, "the kernels, or an error")
        if self.name == ISA:
            return "instead of the best instruction set" if value else "the best instruction set"
        if self.name == SPINS:
            if not value:
                return "idle torch threads keep a core busy for some ms after each call"
            own = "; in your own programs, set it before torch is loaded" if self.by == "kvik" else ""
            return f"turns that an idle torch thread spins before it sleeps{own}"
        if self.name == POLICY:
            spin = {"": f"no need to, {SPINS} decides", "passive": "idle torch threads sleep at once"}
            return spin.get(value, f"idle torch threads spin for minutes, unless {SPINS} is set")
        return "threads of torch; kvik's own take every core" if value else "torch takes every core that it may"


@dataclass(frozen=True)
class Cuda:
    """
    Attributes:
        devices: names of what torch can use.
    """

    devices: tuple[str, ...]

    @property
    def available(self) -> bool:
        """Whether --device cuda works."""
        return bool(self.devices)


@dataclass(frozen=True)
class Held:
    """A prepared model: its name, folder, what it was made from, bytes of its files."""

    name: str
    folder: str
    source: str
    nbytes: int


@dataclass(frozen=True)
class Models:
    """
    Attributes:
        home: kvik's folder, whether it is there or not.
        held: the prepared models in it.
    """

    home: str
    held: tuple[Held, ...]

    @property
    def nbytes(self) -> int:
        """Of all of them."""
        return sum(each.nbytes for each in self.held)


@dataclass(frozen=True)
class Rate:
    """Products of one weight format.

    Attributes:
        format: how the weights are held.
        arithmetic: what multiplies.
        rows: at once.
        unit: "B/s", bytes of weights, or "op/s", where a multiplication and its addition are two operations.
        figure: in that unit.
    """

    format: str
    arithmetic: str
    rows: int
    unit: str
    figure: Spread


@dataclass(frozen=True)
class Padding:
    """Law 1 for one weight format: what it takes for a row's bits not to depend on the rows beside it.

    Attributes:
        format: how weights are held.
        arithmetic: what multiplies.
        rows: the number of rows that a product is padded to a multiple of; 1 = none needed; None = no padding helps,
            and the format is refused here.
    """

    format: str
    arithmetic: str
    rows: int | None


@dataclass(frozen=True)
class Reading:
    """Bytes a second that so many threads read from memory."""

    threads: int
    figure: Spread


@dataclass(frozen=True)
class Measured:
    """
    Attributes:
        buffer: bytes that were read in one pass.
        memory: by one thread, and by all.
        rates: of products.
        paddings: by format.
        stolen: share of the processors' time that went to other guests of the same host meanwhile.
    """

    buffer: int
    memory: tuple[Reading, ...]
    rates: tuple[Rate, ...]
    paddings: tuple[Padding, ...]
    stolen: float


@dataclass(frozen=True)
class Machine:
    """What `examine` found. `measured` is None where nothing was to be measured."""

    versions: Versions
    processor: Processor
    kernels: Kernels
    threads: Threads
    settings: tuple[Setting, ...]
    cuda: Cuda
    models: Models
    measured: Measured | None

    def setting(self, name: str) -> Setting:
        """One of VARIABLES."""
        return next(each for each in self.settings if each.name == name)

    @property
    def warnings(self) -> tuple[str, ...]:
        """A line for each thing that costs speed here, with the way out."""
        return (*self._about_kernels(), *self._about_threads(), *self._about_load())

    def _about_kernels(self) -> Iterator[str]:
        if self.setting(OPS).value == "reference":
            yield "KVIK_OPS=reference: plain torch is used, several times slower; unset it"
        elif self.kernels.path is None:
            yield NOT_BUILT
        elif self.kernels.isa != self.kernels.available[-1]:
            best = self.kernels.available[-1]
            yield f"KVIK_ISA={self.kernels.isa}: this processor has {best}, which is faster; unset it"

    def _about_threads(self) -> Iterator[str]:
        usable = max(round(self.processor.usable), 1)
        cores = f"{usable} usable core{'' if usable == 1 else 's'}"
        if self.threads.kernels is not None and self.threads.kernels > usable:
            yield (
                f"kvik's pool has {self.threads.kernels} threads for {cores}, so they wait for each other; "
                f"allow it no more cores, as 'taskset -c 0-{usable - 1}' does"
            )
        count = self.setting(COUNT).value
        if self.threads.torch > usable:
            many = f"torch has {self.threads.torch} threads for {cores}"
            yield f"{many}, so they wait for each other; set {COUNT}={usable}"
        elif self.threads.torch < usable and count:
            yield f"{COUNT}={count}: torch computes with {self.threads.torch} of {cores}; unset it"
        if self.setting(SPINS).value is None:
            yield (
                "GOMP_SPINCOUNT is not set, so idle torch threads take time from kvik's own; "
                "set GOMP_SPINCOUNT=3000 before torch is loaded"
            )

    def _about_load(self) -> Iterator[str]:
        if self.measured is None:
            return
        if self.processor.load > self.processor.cores / 2:
            yield (
                f"load {self.processor.load:.1f} on {self.processor.cores} cores: figures are of a busy machine; "
                "measure again when it is quiet"
            )
        if self.measured.stolen > STOLEN:
            yield (
                f"{self.measured.stolen:.0%} of the processors' time went to other guests of this host meanwhile: "
                "figures are of a busy machine"
            )

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values: bytes, seconds, bytes and operations a second."""
        facts = asdict(self)
        facts["settings"] = {each.name: {"value": each.value, "by": each.by or None} for each in self.settings}
        facts["processor"]["usable"] = self.processor.usable
        facts["cuda"]["available"] = self.cuda.available
        facts["models"]["nbytes"] = self.models.nbytes
        return facts | {"warnings": list(self.warnings)}

"""Make lists of parameters and gradients that one backend takes, and keep what stays between the
steps."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from samkernels import backends, checks
from samkernels.backends import Backend, TensorList
from samkernels.optim import _shards
from samkernels.optim._axes import Ascent, ascent

if TYPE_CHECKING:
    from samkernels.optim._perturbation import Perturbation

T = TypeVar("T")


@dataclass(eq=False)
class Place:
    """Says where a parameter lives and which backend serves it. Parameters that are alike share one
    object, which is compared by identity."""

    device: torch.device
    dtype: torch.dtype
    backend: str
    process_groups: tuple[Any, ...] = ()  # over which parameters here are sharded
    has_addresses: bool = True  # see checks.has_address
    # Whether a slot here has had an empty_momentum: most steps need not look at each.
    notes_empty_momenta: bool = False

    def __post_init__(self) -> None:
        self.ops = backends.get(self.backend)
        self.has_streams = self.device.type == "cuda"  # asking a device takes long


class EmptyMomentum(NamedTuple):
    """Keeps a momentum buffer that may be empty, which the host does not know.

    Args:
        is_empty: says on the device whether all steps with the buffer were skipped.
        shared_by: how many parameters have this is_empty, which is written in place: those whose
            steps were the same so far.
    """

    buffer: Tensor
    is_empty: Tensor
    shared_by: int


@dataclass(eq=False)
class Slot:
    """Keeps what is known of a parameter from step to step. Slots are compared by identity."""

    param: Tensor
    place: Place
    old: Tensor  # room for w, laid out like local
    own: dict[str, Tensor] = field(default_factory=dict)  # state of the variant, laid out likewise
    empty_momentum: EmptyMomentum | None = None  # of a buffer that began with dampening

    @property
    def local(self) -> Tensor:
        """Return the tensor that kernels work on: param, or of a DTensor the part that lies here.
        Each step asks anew, since FSDP2 may replace that part."""
        return _shards.local(self.param)


class Kind(NamedTuple):
    """Says what sets parameters of one group in one place apart: see SAM's arguments."""

    is_moved: bool = True
    is_scaled: bool = True
    is_new: bool = False  # the variant's own state holds nothing yet


KIND = Kind()  # the kind of most parameters


@dataclass(eq=False)
class Bucket:
    """Holds parameters of one group, place and kind, and within a step their gradients. A bucket is
    kept from step to step for as long as nothing but gradients and addresses changes."""

    group: dict[str, Any]
    place: Place
    kind: Kind
    slots: list[Slot]
    params: TensorList  # local tensors, as are all below
    grads: TensorList
    old: TensorList  # those of the slots
    keys: dict[str, str]  # keys of SAM's options in the group: see SAM._keys
    # By function, the values of options of the group, and what the function made of them.
    made: dict[Callable[..., Any], tuple[tuple[Any, ...], Any]] = field(default_factory=dict)
    checked_values: dict[str, Any] = field(default_factory=dict)  # values of a variant's options

    def __post_init__(self) -> None:
        self.ops: Backend = self.place.ops  # these lists were checked when they were made
        self.is_whole = all(map(operator.is_, self.params, map(_param_of, self.slots)))

    @property
    def whole(self) -> TensorList:
        """Return the parameters themselves, to which others write."""
        return self.params if self.is_whole else [slot.param for slot in self.slots]

    @property
    def numel(self) -> int:
        """Return the number of elements of the parameters, those in other processes too."""
        return sum(slot.param.numel() for slot in self.slots)

    def bring(self, number: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Bring a number over all buckets, or one for each tensor of this one, to its device: in
        the dtype that ops take coefficients in, or in another one."""
        if dtype is None:
            dtype = torch.float64 if self.place.dtype is torch.float64 else torch.float32
        if number.dtype is dtype and number.device == self.place.device and number.is_contiguous():
            return number
        if number.dim() == 1 and number.numel() != len(self.slots):  # as GradScaler's, shape (1,)
            number = number.reshape(())
        return number.to(self.place.device, dtype, non_blocking=True).contiguous()

    def select(self, keep: Callable[[Slot], bool]) -> Bucket:
        """Return the part whose slots satisfy `keep`; the bucket itself if all do."""
        indices = [i for i, slot in enumerate(self.slots) if keep(slot)]
        if len(indices) == len(self.slots):
            return self
        slots = [self.slots[i] for i in indices]
        grads = [self.grads[i] for i in indices]
        return bucket_of(self.group, self.place, self.kind, slots, grads, self.keys)

    def ascent(self, sign: float) -> Ascent:
        """Say how the bucket is perturbed; with a negative sign, against the direction."""
        group, keys = self.group, self.keys
        flips = sign < 0 or group.get("maximize", False)  # a momentum has that sign already
        rho, adaptive, scaling, eta = group[keys["rho"]], False, None, 0.0
        if self.kind.is_scaled:
            adaptive, scaling = group[keys["adaptive"]], group.get(keys["scaling"])
            eta = group.get(keys["eta"], 0.0)
        return self.checked(ascent, rho, flips, adaptive, scaling, eta)

    def checked(self, make: Callable[..., T], *values: Any) -> T:
        """Return make(*values, like=params[0]), which checks options of the group; for values that
        are plain and the very same as in the last step, return what it made then."""
        # Values are compared by identity: True is not 1, and tensors may change.
        known = self.made.get(make)
        if known is not None and all(map(operator.is_, values, known[0])):
            return known[1]
        made = make(*values, like=self.params[0])
        if all(map(_is_plain, values)):
            self.made[make] = values, made
        return made


def _is_plain(value: object) -> bool:
    if type(value) is tuple:
        return all(map(_is_plain, value))
    return type(value) in (float, int, bool, str, type(None))


def refuse_capture(
    why: str = "this step makes memory and state of the optimizer that every replay would make "
    "anew: make one step before the capture",
) -> None:
    """Raise RuntimeError while a CUDA graph is captured. A replay would make anew what is made now,
    such as momentum, and lose what it held."""
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"a CUDA graph is being captured, and {why}")


def current_stream(device: torch.device) -> Any:
    """Return the current stream; None where there are no streams."""
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


# The slots of all optimizers that have perturbed now.
_PERTURBED: set[weakref.ref[Slots]] = set()


class Slots:
    """Keeps the slots of an optimizer's parameters from step to step, and the perturbation."""

    def __init__(
        self,
        backend: str,
        options: dict[str, Any],
        keys: dict[str, str],
        kind_of: Callable[[dict[str, Any], int, dict[str, Tensor]], Kind] | None = None,
    ) -> None:
        """Take SAM's options by key, for groups that come to be without them, and `kind_of`: it
        gives the kind of the parameter at an index of a group, from the state that the variant has
        for the parameter; None if all are of one kind."""
        self.perturbation: Perturbation | None = None  # between the steps; see hold
        self._weakly = weakref.ref(self)
        # The optimizer, whose method this is, holds the slots: weakly, both are freed at once.
        self._kind_of = None if kind_of is None else weakref.WeakMethod(kind_of)
        self._backend = backend
        self._options = options
        self._keys = keys
        self._places: dict[tuple[Any, ...], Place] = {}
        self._slots: dict[int, Slot] = {}  # by id of the parameter, which its slot keeps alive
        self._has_new = False  # whether slots or addresses came since parameters were compared
        self._num_params = 0
        # By group, the buckets of the last step; and in _seen, if there are several, the parameters
        # of the group, those from which each bucket has its own, and all others.
        self._last: dict[int, list[Bucket]] = {}
        self._read: list[Bucket] = []  # buckets of all groups that have gradients now
        self._seen: dict[int, tuple[list[Tensor], list[list[Tensor]], list[Tensor]]] = {}

    def hold(self, perturbation: Perturbation | None) -> None:
        self.perturbation = perturbation
        (_PERTURBED.discard if perturbation is None else _PERTURBED.add)(self._weakly)

    def check_alone(self, buckets: list[Bucket]) -> None:
        """Raise RuntimeError if another optimizer has perturbed one of these parameters."""
        for weakly in list(_PERTURBED):
            other = weakly()
            if other is None:
                _PERTURBED.discard(weakly)
            if other is None or other is self or other.perturbation is None:
                continue
            theirs = {slot.param for slot in chain.from_iterable(other.perturbation.moved)}
            for slot in (slot for bucket in buckets for slot in bucket.slots):
                if slot.param in theirs:
                    raise RuntimeError(
                        f"a parameter of shape {tuple(slot.param.shape)} is at w + e(w) of another "
                        "optimizer, whose first_step was called and whose second_step was not: "
                        "finish one step, or restore(), before the other begins"
                    )

    def serves(self, slot: Slot) -> bool:
        """Say whether the slot still suits its parameter, which may have been cast, moved or laid
        out anew since."""
        place = self._places.get(_place_key(slot.param))
        return place is slot.place and fits(slot.old, slot.local)

    def place_of(self, p: Tensor) -> Place:
        """Return p's place. Raise RuntimeError if the backend that was named cannot serve p, and
        ValueError if no backend should."""
        if _shards.local(p).is_neg():
            raise ValueError(
                f"a parameter of shape {tuple(p.shape)} is a view that PyTorch negates when it "
                "reads it, like z.conj().imag: give a copy (p.resolve_neg())"
            )
        key = _place_key(p)
        if key not in self._places:
            device, dtype, dense, process_groups, has_addresses = key
            if process_groups and not dense and has_addresses:
                # A shard may have gaps in one process and none in the next: their lists would
                # differ, and sums of different tensors would be added.
                raise ValueError(
                    f"a parameter of shape {tuple(p.shape)} has a shard with gaps in its memory: "
                    "shard a contiguous tensor"
                )
            backend = backends.choose(self._backend, device, dtype, dense)[0]
            self._places[key] = Place(device, dtype, backend, process_groups, has_addresses)
        return self._places[key]

    def empty_momenta(self) -> set[int]:
        """Return the ids of momentum buffers whose steps were all skipped. The host may wait."""
        noted = [slot.empty_momentum for slot in self._slots.values()]
        return {id(momentum.buffer) for momentum in filter(None, noted) if momentum.is_empty}

    def forget_lists(self) -> None:
        """Let the next step look closely, and hold no state that is about to be replaced."""
        self._last.clear()
        self._read = []

    def drop_gradients(self) -> None:
        """Hold no gradients between the halves of a step, nor parts of DTensors, which FSDP2 may
        replace."""
        for bucket in self._read:
            bucket.grads = []
            if not bucket.is_whole:
                bucket.params = []

    def forget_own(self) -> None:
        """Begin anew with the state of the variant."""
        for slot in self._slots.values():
            slot.own = {}
        self.forget_lists()

    def __len__(self) -> int:
        return len(self._slots)

    def find(self, p: Tensor) -> Slot | None:
        return self._slots.get(id(p))

    def find_or_add(self, p: Tensor) -> Slot:
        slot = self._slots.get(id(p))
        return slot if slot is not None and self.serves(slot) else self._add(p)

    def _add(self, p: Tensor) -> Slot:
        """Make a slot for a parameter that has none, or was cast, moved or laid out anew; then the
        state of the variant goes with it."""
        slot = Slot(p, self.place_of(p), torch.empty_like(_shards.local(p), requires_grad=False))
        own = self.own_of(p).items()
        slot.own = {n: laid_out_like(slot.old, t) for n, t in own if t.shape == slot.old.shape}
        self._slots[id(p)] = slot
        self._has_new = True
        return slot

    def own_of(self, p: Tensor) -> dict[str, Tensor]:
        """Return the state of the variant for a parameter."""
        slot = self._slots.get(id(p))
        return {} if slot is None else slot.own

    def buckets(
        self, groups: list[dict[str, Any]], perturbation: Perturbation | None = None
    ) -> list[Bucket]:
        """Return all parameters that have a gradient. A gradient in another layout is copied to its
        parameter's, and a parameter that was cast, moved or laid out anew gets a new slot.

        Raises:
            RuntimeError: a parameter that the perturbation moved would get a new slot.
            TypeError: a group holds something else than tensors.
            ValueError: a gradient is sparse, or a parameter is in the groups twice.
        """
        self._read = buckets = []
        num_params = 0
        looked = False
        for index, group in enumerate(groups):
            num_params += len(group["params"])
            if perturbation is None and self._kind_of is not None and self._had_new(index):
                current = None  # they may have got state since
            else:
                current = self._as_before(index, group)
            if current is None:
                current = self._look_closely(index, group, perturbation)
                looked = looked or bool(current) or index in self._last
                if not current:
                    continue
                self._last[index] = current
            buckets += current
        if looked or self._has_new:
            try:
                self._refuse_shared(groups, buckets)
            except ValueError:
                self.forget_lists()  # or the next step would take them as they were
                raise
        if perturbation is None and (looked or num_params != self._num_params):
            self._forget_all_but(groups)
            self._num_params = num_params
        return buckets

    def _refuse_shared(self, groups: list[dict[str, Any]], buckets: list[Bucket]) -> None:
        slots = list(chain.from_iterable(bucket.slots for bucket in buckets))
        if len(set(slots)) < len(slots):
            _refuse_repeated(groups)
        if self._has_new:
            # Parameters that were frozen have not been compared before.
            checks.check_disjoint("params", [slot.local for slot in slots])
            self._has_new = False

    def _forget_all_but(self, groups: list[dict[str, Any]]) -> None:
        """Let go of parameters that were removed or replaced."""
        params = chain.from_iterable(group["params"] for group in groups)
        gone = self._slots.keys() - set(map(id, params))
        for key in gone:
            del self._slots[key]
        if gone:
            self._last = {
                index: buckets
                for index, buckets in self._last.items()
                if not any(id(slot.param) in gone for b in buckets for slot in b.slots)
            }

    def _had_new(self, index: int) -> bool:
        return any(bucket.kind.is_new for bucket in self._last.get(index, ()))

    def _as_before(self, index: int, group: dict[str, Any]) -> list[Bucket] | None:
        """Return the last step's buckets with the gradients of now, if nothing else differs."""
        last = self._last.get(index)
        if not last:
            return None
        candidates = [group["params"]]
        if len(last) > 1:
            params, candidates, others = self._seen[index]
            if len(params) != len(group["params"]) or any(p.grad is not None for p in others):
                return None
            if not all(map(operator.is_, params, group["params"])):
                return None
        for bucket, of_bucket in zip(last, candidates, strict=True):
            read = bucket.ops.gradients_of(of_bucket, bucket.params)
            if read is None:
                read = _read_alike(bucket, of_bucket)
            elif read[0] is not bucket.params:
                self._has_new = True  # a parameter lies elsewhere now, maybe where another does
                if any(map(Tensor.is_neg, read[0])):
                    return None
            if read is None:
                return None
            bucket.group = group
            bucket.params, bucket.grads = read
        return last

    def _look_closely(
        self, index: int, group: dict[str, Any], perturbation: Perturbation | None
    ) -> list[Bucket]:
        """Make the buckets of one group, parameter by parameter."""
        found: dict[tuple[Place, Kind], tuple[list[Slot], list[Tensor]]] = {}
        for key, value in self._options.items():
            group.setdefault(key, value)
        for i, p in enumerate(group["params"]):
            if not isinstance(p, Tensor):
                raise TypeError(
                    f"params[{i}] of parameter group {index} is {type(p).__name__}: give a tensor"
                )
            grad = p.grad
            if grad is None:
                continue
            if grad.layout is not torch.strided:
                checks.check_tensor(f"params[{i}].grad of parameter group {index}", grad)
            slot = self._slots.get(id(p))
            if slot is None or not self.serves(slot):
                if perturbation is not None and slot in perturbation.slots:
                    raise RuntimeError(
                        f"a parameter of shape {tuple(p.shape)} changed its shape, dtype, device "
                        "or layout while it was at w + e(w): do that between whole steps, or in "
                        "unperturbed() of a variant with one pass. The weights were restored."
                    )
                refuse_capture()
                name = f"params[{i}] of parameter group {index}"
                _shards.check(name, p)
                checks.check_tensor(name, _shards.local(p))
                slot = self._add(p)
                if not slot.place.has_addresses:
                    _check_copies(name, slot)
            grad = _shards.local(_shards.cut_like(p, grad))
            is_at = slot.place.has_addresses and _is_at(grad, slot.local)
            if is_at or not fits(grad, slot.local) or grad.is_neg():
                grad = laid_out_like(slot.local, grad)
            slots, grads = found.setdefault((slot.place, self._kind(group, i, slot)), ([], []))
            slots.append(slot)
            grads.append(grad)
        if len(found) > 1:
            self._remember(index, group, list(found))
        return [bucket_of(group, *key, *lists, self._keys) for key, lists in found.items()]

    def _kind(self, group: dict[str, Any], i: int, slot: Slot | None) -> Kind:
        kind_of = None if self._kind_of is None else self._kind_of()
        return KIND if kind_of is None else kind_of(group, i, slot.own if slot else {})

    def _remember(self, index: int, group: dict[str, Any], found: list[tuple[Place, Kind]]) -> None:
        """Note from which parameters each bucket has its own: those without a gradient, too."""
        candidates: dict[Any, list[Tensor]] = {key: [] for key in found}
        others: list[Tensor] = []
        for i, p in enumerate(group["params"]):
            slot = self._slots.get(id(p))
            key = None if slot is None else (slot.place, self._kind(group, i, slot))
            candidates.get(key, others).append(p)
        self._seen[index] = list(group["params"]), list(candidates.values()), others


def _refuse_repeated(groups: list[dict[str, Any]]) -> None:
    seen: dict[int, str] = {}
    for index, group in enumerate(groups):
        for i, p in enumerate(group["params"]):
            name = f"params[{i}] of parameter group {index}"
            if id(p) in seen and p.grad is not None:
                raise ValueError(
                    f"{seen[id(p)]} and {name} are the same, of shape {tuple(p.shape)}: leave it "
                    "in one place"
                )
            seen[id(p)] = name


def _check_copies(name: str, slot: Slot) -> None:
    """Raise TypeError unless a wrapper has copies of its kind, by which w is kept and restored."""
    failure: str | Exception = "empty_like gives a plain tensor"
    try:
        slot.old.copy_(slot.local)
        slot.local.copy_(slot.old)
        if not checks.has_address(slot.old):
            return
    except Exception as error:
        failure = error
    raise TypeError(
        f"{name} is {type(slot.local).__name__}, which cannot be copied and copied back, so that w "
        f"could not be restored: freeze it, or leave it out ({failure})"
    )


def _read_alike(bucket: Bucket, candidates: list[Tensor]) -> tuple[TensorList, TensorList] | None:
    """Do as Backend.gradients_of for all backends, and for shards."""
    try:
        params = [p for p in candidates if p.grad is not None]
    except AttributeError:  # one is no tensor; the closer look says so
        return None
    if len(params) != len(bucket.slots):
        return None
    if not all(map(operator.is_, params, map(_param_of, bucket.slots))):
        return None
    found = [p.grad for p in params if p.grad is not None]
    here = _shards.local_pairs(params, found)
    if here is None:
        return None
    params, grads = here
    if any(map(Tensor.is_neg, chain(params, grads))):
        return None
    if bucket.place.has_addresses and any(map(_is_at, grads, params)):
        return None
    backend = bucket.ops
    try:
        prepared = backend.prepare(params), backend.prepare(grads)
        return prepared if backend.are_alike(bucket.old, *prepared) else None
    except (RuntimeError, TypeError):  # a tensor has no memory; the closer look says so
        return None


_param_of = operator.attrgetter("param")


def _place_key(p: Tensor) -> tuple[torch.device, torch.dtype, bool, tuple[Any, ...], bool]:
    here = _shards.local(p)
    groups = _shards.process_groups(p)
    return here.device, here.dtype, checks.is_dense(here), groups, checks.has_address(here)


def bucket_of(
    group: dict[str, Any],
    place: Place,
    kind: Kind,
    slots: list[Slot],
    grads: list[Tensor],
    keys: dict[str, str],
) -> Bucket:
    params = place.ops.prepare([slot.local for slot in slots])
    old = place.ops.prepare([slot.old for slot in slots])
    return Bucket(group, place, kind, slots, params, place.ops.prepare(grads), old, keys)


def _is_at(grad: Tensor, p: Tensor) -> bool:
    """Say whether both are one memory, as after p.grad = p.data: g would move with w."""
    try:
        return grad.data_ptr() == p.data_ptr() != 0
    except RuntimeError:  # a tensor without memory
        return False


def fits(tensor: Tensor, p: Tensor) -> bool:
    """Say whether a tensor can be beside p in a list: dtype, device, shape and order in memory."""
    if tensor.dtype is not p.dtype or tensor.device != p.device or tensor.shape != p.shape:
        return False
    return checks.same_layout(tensor, p) or not (
        checks.is_dense(p) or checks.overlaps_itself(tensor)
    )


def laid_out_like(p: Tensor, tensor: Tensor) -> Tensor:
    """Return a copy with the dtype, device and layout of p.

    Raises:
        ValueError: the shapes differ.
    """
    if tensor.shape != p.shape:
        raise ValueError(
            f"a gradient or momentum buffer has shape {tuple(tensor.shape)} and its parameter has "
            f"{tuple(p.shape)}: give it the parameter's shape"
        )
    return torch.empty_like(p, requires_grad=False).copy_(tensor)

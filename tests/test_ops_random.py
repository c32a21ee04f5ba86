"""The ops on random lists of tensors."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from samkernels import ops
from tests import test_ops_adam
from tests.helpers import CHUNK_SIZE, MIXES, SETTINGS, Setting, Slot, assert_same_bits, copies
from tests.test_ops import (
    PERTURBATIONS,
    SGD_OPTIONS,
    check_perturb,
    check_sgd,
)

pytest.importorskip("hypothesis")  # no CUDA machine need have it

from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tests import examples  # noqa: F401


def slots_of_any_layout() -> st.SearchStrategy[Slot]:
    shapes = st.lists(st.sampled_from([0, 1, 2, 3, 5, 16]), max_size=4).map(tuple)
    long_vectors = st.integers(0, 3 * CHUNK_SIZE).map(lambda n: (n,))
    return st.one_of(shapes, long_vectors).flatmap(
        lambda shape: st.builds(
            Slot,
            shape=st.just(shape),
            order=st.permutations(range(len(shape))).map(tuple),
            offset=st.integers(0, 7),
            gap=st.just(1),
        )
    )


SMOOTH = [name for name in MIXES if name != "damp"]  # see tests/test_ops.py

random_lists = given(
    slots=st.lists(slots_of_any_layout(), min_size=1, max_size=6),
    setting=st.sampled_from(SETTINGS),
    data=st.data(),
)
# Derandomised: CI tries the same lists each time.
reproducible = hypothesis_settings(max_examples=50, deadline=None, derandomize=True)


@reproducible
@random_lists
def test_perturb_and_restore_of_random_lists(
    slots: list[Slot], setting: Setting, data: st.DataObject
) -> None:
    options = data.draw(st.sampled_from(list(PERTURBATIONS.values())))

    def perturb(
        params: list[Tensor], grads: list[Tensor], old_params: list[Tensor], **kwargs: Any
    ) -> Tensor:
        before = copies(params)
        square = ops.perturb_(params, grads, old_params, **kwargs)
        perturbed = copies(params)
        ops.restore_(params, old_params, backend=setting.backend)
        assert_same_bits(params, before)
        ops.restore_(params, perturbed, backend=setting.backend)
        return square

    check_perturb(perturb, slots, setting, **options)


@reproducible
@random_lists
def test_sgd_of_random_lists(slots: list[Slot], setting: Setting, data: st.DataObject) -> None:
    mix = data.draw(st.sampled_from(SMOOTH))
    options = data.draw(st.sampled_from(list(SGD_OPTIONS.values())))
    check_sgd(ops.sgd_, slots, setting, mix, **options)


@reproducible
@random_lists
def test_adam_of_random_lists(slots: list[Slot], setting: Setting, data: st.DataObject) -> None:
    mix = data.draw(st.sampled_from(SMOOTH))
    options = data.draw(st.sampled_from(list(test_ops_adam.OPTIONS.values())))
    test_ops_adam.check_adam(ops.adam_, slots, setting, mix, **options)


def test_the_same_examples_whatever_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def drawn() -> list[int]:
        numbers = []

        @hypothesis_settings(max_examples=200, derandomize=True)
        @given(st.integers(0, 2**40))
        def draw(number: int) -> None:
            numbers.append(number)

        draw()
        return numbers

    before = drawn()
    file = tmp_path / "imported_meanwhile.py"
    file.write_text(f"CONSTANTS = {[*range(2**39, 2**39 + 400)]}")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, file.stem, module)
    assert drawn() == before

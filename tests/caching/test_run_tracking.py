"""Step counting, contexts and resets of `RunTracker`; hooks that leave no trace."""

from __future__ import annotations

import itertools

import pytest
import torch
from diffusers.hooks import HookRegistry, ModelHook

from diffusers_ext.caching._common import Inputs, RunTracker, install, map_tensors, tensors_in


X = torch.zeros(2, 4, 8, 8)


def tracker():
    numbers = itertools.count()
    return RunTracker(lambda: next(numbers))


def begin(run, t, x=X, conditioning=(), name=None):
    position = run.begin(Inputs(x, t, list(conditioning)), name)
    return position.step, position.state


def test_steps_are_counted_whatever_the_timesteps():
    run = tracker()
    times = [9.5, 7.25, 6, torch.tensor(3), torch.tensor([1.0, 0.5])]
    assert [begin(run, t) for t in times] == [(i, 0) for i in range(5)]
    assert run.runs == 1


def test_a_rising_timestep_starts_a_run():
    run = tracker()
    assert [begin(run, t) for t in (9, 5, 9, 5)] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert run.runs == 2


def test_reset_starts_a_run_even_at_the_same_timestep():
    run = tracker()
    begin(run, 9)
    run.reset()
    assert begin(run, 9) == (0, 1) and run.runs == 2


def test_another_schedule_starts_a_run():
    """A run that was abandoned after its first step, then one that starts at the same or a smaller timestep."""
    run = tracker()
    first, second = torch.tensor([9, 5, 1]), torch.tensor([9, 5, 1])
    assert [begin(run, first[0]), begin(run, second[0]), begin(run, second[1])] == [(0, 0), (0, 1), (1, 1)]
    assert begin(run, torch.tensor([3, 1])[0]) == (0, 2)


@pytest.mark.parametrize(
    "other", [torch.zeros(1, 4, 8, 8), torch.zeros(2, 4, 8, 16), X.double(), torch.zeros(2, 4, 8, 8, device="meta")]
)
def test_another_layout_starts_afresh(other):
    run = tracker()
    begin(run, 9)
    assert begin(run, 5, other) == (0, 1)


def test_contexts_by_conditioning():
    cond, uncond = torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)
    run = tracker()
    seen = [begin(run, t, conditioning=[c]) for t in (9, 5, 1) for c in (cond, uncond)]
    assert seen == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    batch = torch.zeros(4, 3, 4)
    run = tracker()
    seen = [begin(run, t, conditioning=[batch[i : i + 2]]) for t in (9, 5) for i in (0, 2)]
    assert seen == [(0, 0), (0, 1), (1, 0), (1, 1)], "slices of one tensor are told apart and recognised"


def test_conditioning_changed_in_place_is_another_context():
    prompt = torch.zeros(2, 3, 4)
    run = tracker()
    begin(run, 9, conditioning=[prompt])
    prompt.add_(1)
    assert begin(run, 5, conditioning=[prompt]) == (0, 1)


def test_freed_conditioning_is_never_mistaken_for_new():
    run = tracker()
    seen = [begin(run, 9 - i, conditioning=[torch.full((64, 64), float(i))]) for i in range(5)]
    assert seen == [(0, i) for i in range(5)]


def test_contexts_by_name():
    run = tracker()
    seen = [begin(run, t, name=n) for t in (9, 5) for n in ("cond", "uncond")]
    assert seen == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_a_context_that_sat_out_a_step_starts_afresh():
    """Guidance in an interval: the unconditional call pauses; its features must not come back."""
    cond, uncond = torch.zeros(1), torch.zeros(1)
    run = tracker()
    for t in (9, 8):
        begin(run, t, conditioning=[cond])
        begin(run, t, conditioning=[uncond])
    begin(run, 7, conditioning=[cond])
    assert begin(run, 6, conditioning=[cond]) == (3, 0)
    assert begin(run, 6, conditioning=[uncond]) == (0, 2)


def test_several_calls_at_one_timestep_have_a_state_each():
    run = tracker()
    assert [begin(run, t) for t in (9, 9, 5, 5)] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    heun = tracker()
    seen = [begin(heun, t) for t in (9, 5, 5, 3, 3, 1)]
    assert seen == [(0, 0), (1, 0), (0, 1), (2, 0), (1, 1), (3, 0)]


def test_inference_tensors_work():
    with torch.inference_mode():
        x, c = torch.zeros(1, 4, 8, 8), torch.zeros(1)
        run = tracker()
        assert [begin(run, t, x, [c]) for t in (9, 5)] == [(0, 0), (1, 0)]


def test_map_tensors_keeps_structure():
    tree = (torch.ones(1), [torch.ones(2), None], {"a": torch.ones(3), "b": "text"})
    doubled = map_tensors(tree, lambda t: t * 2)
    assert [t.sum().item() for t in tensors_in(doubled)] == [2, 4, 6]
    assert doubled[1][1] is None and doubled[2]["b"] == "text" and isinstance(doubled, tuple)


class Add(ModelHook):
    def __init__(self, value, stateful=False):
        super().__init__()
        self.value, self._is_stateful, self.resets = value, stateful, 0

    def new_forward(self, module, *args, **kwargs):
        return self.fn_ref.original_forward(*args, **kwargs) * 10 + self.value

    def reset_state(self, module):
        self.resets += 1
        return module


class One(torch.nn.Module):
    def forward(self, x):
        return x


@pytest.mark.parametrize("order", list(itertools.permutations((1, 2, 3))))
def test_hooks_come_off_in_any_order(order):
    model = One()
    undo = {i: install(model, [(model, Add(i))], f"diffusers_ext.{i}") for i in (1, 2, 3)}
    left = [1, 2, 3]
    assert model(0) == 123
    for i in order:
        undo[i]()
        left.remove(i)
        assert model(0) == int("0" + "".join(map(str, left)))
    assert set(vars(model)) == set(vars(One()))


def test_a_foreign_hook_and_its_registry_survive():
    model = One()
    HookRegistry.check_if_exists_or_initialize(model).register_hook(Add(7), "foreign")
    undo = install(model, [(model, Add(1))], "diffusers_ext.a")
    undo()
    assert model(0) == 7 and list(model._diffusers_hook.hooks) == ["foreign"]


def test_reset_is_wired_until_the_last_stateful_hook_is_gone():
    model = One()
    first, second = Add(1, stateful=True), Add(2, stateful=True)
    undo_first = install(model, [(model, first)], "diffusers_ext.a")
    undo_second = install(model, [(model, second)], "diffusers_ext.b")
    model._reset_stateful_cache()
    undo_first()
    model._reset_stateful_cache()
    assert (first.resets, second.resets) == (1, 2)
    undo_second()
    assert not hasattr(model, "_reset_stateful_cache")


def test_install_is_all_or_nothing():
    model = torch.nn.Sequential(One(), One())
    keep = install(model, [(model[1], Add(5))], "diffusers_ext.a")
    with pytest.raises(ValueError, match="already exists"):
        install(model, [(model[0], Add(1)), (model[1], Add(2))], "diffusers_ext.a")
    assert model(0) == 5 and not hasattr(model[0], "_diffusers_hook")
    keep()
    assert model(0) == 0

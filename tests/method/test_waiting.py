"""Where a step waits for the device: traced on a machine without a GPU.

Tensors on "cuda" are fake here (shapes without memory) and tensors on the host are real, as they
are for a program that runs ahead of a GPU. An operation that would make the host wait raises: one
whose result depends on device data, a copy to the host, a copy from pageable host memory, or a host
tensor that takes part in an operation on the device. `opd.device.fetch`, which is meant to wait, is
replaced, and its calls are counted.
"""

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

import opd.device
from opd.config.run import Config, load_config
from opd.data.batch import PromptBatch, collate
from opd.generation.policy import Policy
from opd.generation.recorded import RECORDERS
from opd.generation.sampling import CHECK_EVERY
from opd.method.teacher import Teacher
from opd.method.trainer import Trainer
from opd.models import tiny
from opd.models.load import prepare
from opd.models.video_lm import VideoLM
from opd.record.ledger import Ledger
from tests.fake import shape_of
from tests.helpers import FAMILIES, PAD, make_prompt, slow_after

MODULES = (  # that fetch
    "device",
    "generation.sampling",
    "method.trainer",
    "method.objectives",
    "models.tower",
)
LENGTH = 9  # of completions: one stop check
SAMPLED = 3  # what the replaced `fetch` says of every length


class Waits(RuntimeError):
    """An operation would make the host wait for the device."""


class Ahead(TorchDispatchMode):
    """Fake tensors on "cuda", real ones on the host, and `Waits` for what would wait."""

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
        on_device = [x for x in tensors if isinstance(x, FakeTensor)]
        on_host = [x for x in tensors if not isinstance(x, FakeTensor)]
        device = torch.device(kwargs.get("device") or "cpu")
        if not on_device and device.type != "cuda":
            return func(*args, **kwargs)
        name = func.__name__
        if on_device and "device" in kwargs and device.type == "cpu":
            raise Waits(f"{name}: a copy to the host")
        if on_host and not on_device and name.startswith("_to_copy"):
            if not kwargs.get("non_blocking"):
                raise Waits(f"{name}: a copy from pageable memory")
        elif any(x.dim() for x in on_host):
            raise Waits(f"{name}: a host tensor of shape {[list(x.shape) for x in on_host]}")
        try:
            with self.fake:
                return shape_of(func, tree_map(self._fake, args), kwargs)
        except Exception as error:
            raise Waits(f"{name}: {type(error).__name__}: {error}") from error

    def _fake(self, value: Any) -> Any:
        if isinstance(value, Tensor) and not isinstance(value, FakeTensor):
            return self.fake.from_tensor(value)
        return value


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, ...]]]:
    """The mode, active; yields the shapes of what was fetched."""
    fetched: list[tuple[int, ...]] = []

    def fetch(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, FakeTensor):
            return tensor.detach()
        fetched.append(tuple(tensor.shape))
        value = 0 if tensor.dtype == torch.bool else SAMPLED
        return torch.full(tensor.shape, value, dtype=tensor.dtype)

    for module in MODULES:
        monkeypatch.setattr(f"opd.{module}.fetch", fetch)
    monkeypatch.setattr(opd.device, "pin", lambda tensor: tensor)
    monkeypatch.setitem(RECORDERS, "cuda", lambda step: step)  # what is recorded may not wait
    if not torch.cuda.is_available():  # torch asks for a driver before it asks the mode
        monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    # Row programs need a device: what surrounds their launches is traced.
    triton_rows = pytest.importorskip("fused_kl.triton_rows")
    monkeypatch.setattr(triton_rows, "_start", lambda *_, **__: None)
    with Ahead():
        yield fetched


def on_device(mode: Ahead, size: str, family: str) -> VideoLM:
    """A model in bf16 whose weights are fake."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with mode.fake, torch.device("cuda"):
            model = tiny.build(size, 0, family)
            model.model.language_model.layers = model.model.language_model.layers[:2]
    finally:
        torch.set_default_dtype(default)
    lm = prepare(model)
    lm.train_only("language")
    return lm


def current_mode() -> Ahead:
    (mode,) = (
        m
        for m in torch.utils._python_dispatch._get_current_dispatch_mode_stack()
        if isinstance(m, Ahead)
    )
    return mode


def prompts_of(lm: VideoLM) -> PromptBatch:
    """Two prompts of unequal lengths, pixels on the host."""
    prompts = [make_prompt(lm, "a", pairs=3), make_prompt(lm, "b", pairs=2)]
    examples = [replace(prompt.example, spans=((0.0, 1.0),), duration_s=9.0) for prompt in prompts]
    prompts = [replace(p, example=example) for p, example in zip(prompts, examples, strict=True)]
    return collate(prompts, PAD, "cuda", torch.bfloat16)


def trainer_of(config: Config, family: str) -> Trainer:
    """Random models on the fake device; a backward needs a real one, and is left out."""
    mode = current_mode()
    student, teacher = on_device(mode, "student", family), None
    if config.method != "sft":
        teacher = Teacher(
            on_device(mode, "teacher" if config.method == "opd" else "student", family)
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("opd.method.trainer.Ledger", lambda _: Ledger(torch.device("cpu")))
        processor = SimpleNamespace(tokenizer=tiny.tokenizer())
        allowed = torch.ones(len(student.head.weight), dtype=torch.bool, device="cuda")
        trainer = Trainer(config, processor, student, teacher, Policy(allowed, 0.9, (7,), PAD))
    trainer.engine.backward = lambda loss: None  # type: ignore[method-assign]
    return trainer


METHODS = {
    "reverse_kl": [],
    "sampled": ["objective=sampled"],
    "jsd": ["objective=jsd"],
    "topk": ["objective=topk", "opd.k=4"],
    "constant": ["objective=constant"],
    "with reward": ["opd.reward_coef=0.5", "num_rollouts=2"],
    "sparse": ["opd.tolerance=1e-3"],
    "references": ["opd.completions=reference"],
    "routed": ["curriculum.routing=on"],
    "grpo": ["method=grpo", "num_rollouts=2", "grpo.kl_coef=0.1"],
    "sft": ["method=sft"],
}


@pytest.mark.parametrize(
    ("method", "family"),
    slow_after(
        2,
        [
            ("reverse_kl", FAMILIES[0]),
            ("grpo", FAMILIES[1]),
            ("grpo", FAMILIES[0]),
            ("reverse_kl", FAMILIES[1]),
            *((method, FAMILIES[0]) for method in METHODS if method not in ("reverse_kl", "grpo")),
        ],
    ),
)
def test_a_step_waits_only_where_it_says_so(
    method: str, family: str, ahead: list[tuple[int, ...]]
) -> None:
    keys = ["batch_size=2", f"sample.max_completion_length={LENGTH}", *METHODS[method]]
    config = load_config(keys)
    trainer = trainer_of(config, family)
    [(loss, _)] = trainer.micro_steps([prompts_of(trainer.student)], 0)
    assert isinstance(loss.loss, FakeTensor) and loss.loss.device.type == "cuda"
    checks = LENGTH // CHECK_EVERY["cuda"]
    shape = 2, config.num_rollouts
    expected = [shape] * checks + [(2, *shape)]  # whether all have ended; lengths
    if config.on_references:
        expected = []
    if config.compares or config.routes:
        expected.append((*shape, SAMPLED))  # the tokens, to be graded as text
    assert ahead == expected


def test_an_operation_that_waits_is_noticed(ahead: list[tuple[int, ...]]) -> None:
    """The test above could not fail otherwise."""
    values = torch.zeros(3, 4, device="cuda")
    mask = torch.ones(3, dtype=torch.bool)
    for waits in (
        lambda: values.cpu(),
        lambda: values.sum().item(),
        lambda: values.tolist(),
        lambda: bool(values.any()),
        lambda: values[values > 0],
        lambda: values[mask],
        lambda: values.nonzero(),
        lambda: mask.to("cuda"),
        lambda: torch.repeat_interleave(values[0], values[0].long()),
    ):
        with pytest.raises(Waits):
            waits()
    assert mask.to("cuda", non_blocking=True).device.type == "cuda"
    assert ahead == []

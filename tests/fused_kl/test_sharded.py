"""Losses over a vocabulary that is divided over the ranks of a group, against one process."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.test_zero import torchrun
from tests.fused_kl.shard_worker import CASES

OWN = "the arguments of rank {rank} are wrong: its own error says how"


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What each rank found: differences by case, and messages of errors."""
    out, ranks = tmp_path_factory.mktemp("ranks"), request.param
    worker = str(Path(__file__).with_name("shard_worker.py"))
    run = torchrun(ranks, worker, str(out))
    assert run.returncode == 0, run.stderr[-6000:]
    return [torch.load(out / f"{rank}.pt") for rank in range(ranks)]


@pytest.mark.parametrize("kind", ["unequal", "padded"])
@pytest.mark.parametrize("name", CASES)
def test_loss_values_and_gradients_are_those_of_one_process(results, name, kind):
    if kind == "padded" and name in ("all columns", "cross-entropy"):
        assert f"{name}, {kind}" not in results[0], "padding has to be banned"
        return
    for rank in results:
        assert rank[f"{name}, {kind}"] < 1e-11


def test_fp32(results):
    assert max(rank["fp32"] for rank in results) < 1e-5


def test_trls_loss_with_heads_that_fsdp_shards(results):
    assert max(rank["fsdp"] for rank in results) < 1e-12


def test_every_rank_raises_where_they_do_not_agree(results):
    last = len(results) - 1
    own = OWN.format(rank=last)
    for number, rank in enumerate(results):
        alone = number == last
        messages = rank["messages"]
        assert messages.pop("rows") == (
            f"student_hidden has 3 rows on rank {last}, expected 13 rows as on rank 0"
        )
        assert messages.pop("hidden sizes") == (
            f"student_lm_head has hidden size 8 on rank {last}, "
            "expected hidden size 16 as on rank 0"
        )
        assert messages.pop("dtypes") == (
            f"teacher_lm_head has dtype torch.float32 on rank {last}, "
            "expected dtype torch.float64 as on rank 0"
        )
        assert messages.pop("no bias") == (
            f"student_lm_head has no bias on rank {last}, expected a bias as on rank 0"
        )
        assert messages.pop("no gradient") == (
            f"student_hidden has no gradient on rank {last}, expected a gradient as on rank 0"
        )
        wrong = "student_lm_head has shape"
        assert messages.pop("its own").startswith(wrong if alone else own)
        assert messages.pop("other columns").startswith("teacher_lm_head has" if alone else own)
        assert messages.pop("policy").startswith("advantages has shape [3]" if alone else own)
        assert messages.pop("no column") == (
            "allowed_columns allows no column on any rank, expected at least one True"
        )
        assert "the options of rank 1 are not those of rank 0" in messages.pop("options")
        assert messages.pop("sparse").startswith("mode is 'sparse', expected 'fast' or 'lowmem'")
        assert messages.pop("ids").startswith("token_ids holds 1")
        assert not messages

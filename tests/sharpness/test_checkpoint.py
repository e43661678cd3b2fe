"""A checkpoint of SAM, of its bare base or between the passes, resumes bit for bit."""

from __future__ import annotations

import copy
import re

import numpy as np
import pytest
from torch.optim import SGD

from structprecond import (
    SAM,
    StructPrecondError,
)
from tests.helpers import (
    loss_of,
    mlp,
    same_bits,
    through_a_file,
    values,
)
from tests.sharpness.helpers import BASES, bits, build, one, train


@pytest.mark.parametrize("base", ["SGD", "AdamW", "SIRFShampoo", "SOAP"])
def test_resumes_bit_equal(base: str) -> None:
    cls, kwargs = BASES[base]
    straight = mlp()
    broken, resumed = copy.deepcopy(straight), mlp()
    one_go = SAM(straight, cls, rho=0.4, **kwargs)
    train(straight, one_go, 6)
    first = SAM(broken, cls, rho=0.4, **kwargs)
    train(broken, first, 3)
    first.param_groups[0]["rho"] = np.float64(0.4)  # a scheduler's number
    first.param_groups[0]["rho"] = 0.4
    checkpoint = through_a_file([broken.state_dict(), first.state_dict()])
    second = SAM(resumed, cls, adaptive=False, **kwargs)
    resumed.load_state_dict(checkpoint[0])
    second.load_state_dict(checkpoint[1])
    assert second.param_groups[0]["rho"] == 0.4
    assert second.param_groups[0]["adaptive"] is True
    train(resumed, second, 3, start=3)
    assert same_bits(values(resumed), values(straight))


def test_numpy_numbers_do_not_spoil_checkpoints() -> None:
    sam = SAM([one(1.0)], SGD, rho=np.float64(0.25), lr=0.1)
    assert through_a_file(sam.state_dict())["param_groups"][0]["rho"] == 0.25


@pytest.mark.parametrize("base", ["SGD", "SIRFShampoo"])
def test_checkpoint_of_the_bare_base_leaves_the_settings(base: str) -> None:
    cls, kwargs = BASES[base]
    model = mlp()
    bare = build(cls, model, **kwargs)
    bare.param_groups[0]["lr"] = 0.07
    sam = SAM(model, cls, rho=0.4, adaptive=False, **kwargs)
    sam.param_groups[0]["rho"] = 0.3
    sam.load_state_dict(bare.state_dict())
    group = sam.param_groups[0]
    assert (group["lr"], group["rho"], group["adaptive"]) == (0.07, 0.3, False)


@pytest.mark.parametrize("base", ["SGD", "SIRFShampoo"])
def test_state_dict_between_the_passes(base: str) -> None:
    cls, kwargs = BASES[base]
    model = mlp()
    sam = SAM(model, cls, rho=0.4, **kwargs)
    train(model, sam, 2)
    before, state_dict = values(model), copy.deepcopy(sam.state_dict())
    loss_of(model, 2).backward()
    sam.first_step()
    perturbed = values(model)
    assert same_bits(sam.state_dict(), state_dict)
    with pytest.raises(StructPrecondError, match=re.escape("Call restore(), then load")):
        sam.load_state_dict(state_dict)
    assert same_bits(values(model), perturbed)
    sam.restore()
    sam.load_state_dict(state_dict)
    assert same_bits(bits(model, sam), [before, state_dict])

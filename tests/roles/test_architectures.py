"""The role of every parameter of well-known architectures, built without weights.

Architectures whose packages are not installed are skipped.
"""

from __future__ import annotations

from functools import reduce

import pytest

from tests.roles.architectures.decoders import DECODERS
from tests.roles.architectures.encoders import ENCODERS
from tests.roles.architectures.pictures import TIMM, TORCHVISION
from tests.roles.architectures.senses import SENSES
from tests.roles.architectures.table import check, on_meta, package

TRANSFORMERS = DECODERS | ENCODERS | SENSES
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers(name: str):
    transformers, architecture = package("transformers"), TRANSFORMERS[name]
    model = getattr(transformers, architecture.make)
    config = on_meta(model.config_class, **architecture.settings)
    check(on_meta(model, config=config), architecture.roles)


@pytest.mark.parametrize("name", TIMM)
def test_timm(name: str):
    make = package("timm").create_model
    check(on_meta(make, model_name=TIMM[name].make, num_classes=5), TIMM[name].roles)


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(name: str):
    architecture = TORCHVISION[name]
    make = reduce(getattr, architecture.make.split("."), package("torchvision").models)
    check(on_meta(make, **architecture.settings), architecture.roles)


def test_there_are_many():
    assert len(TRANSFORMERS) + len(TIMM) + len(TORCHVISION) >= 60

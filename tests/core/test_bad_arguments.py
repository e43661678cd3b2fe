"""Wrong arguments of optimizers, strategies and groupings raise errors that name them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from structprecond import (
    LARS,
    SOAP,
    AdamW,
    AdamWStrategy,
    KLShampoo,
    LinearWeightBias,
    Muon,
    MuonStrategy,
    PerParameter,
    Scion,
    ScionStrategy,
    Shampoo,
    SOAPStrategy,
    SplitHeads,
    StructuredOptimizer,
)
from tests.helpers import assert_refused

ARGUMENTS: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "grafting": (lambda m: Shampoo(m, grafting="adamw"), "grafting.*'adamw'"),  # type: ignore[arg-type]
    "root": (lambda m: Shampoo(m, root="svd"), "root.*'svd'"),  # type: ignore[arg-type]
    "exponent": (
        lambda m: Shampoo(m, exponent=-0.5),
        r"exponent must be a finite number above 0.*-0\.5",
    ),
    "start step": (lambda m: Shampoo(m, start_preconditioning_step=0), "at least 1.*0"),
    "clip_rms": (lambda m: SOAP(m, clip_rms=0.0), r"clip_rms must be a finite.*got 0\.0"),
    "two ways of merging": (
        lambda m: SOAP(m, merge_dims=True, combine_params=(PerParameter(),)),
        "merge_dims=True is short for.*Put MergeDims into combine_params",
    ),
    "data format": (
        lambda m: SOAP(m, merge_dims=True, data_format="foo"),  # type: ignore[arg-type]
        "data_format must be 'channels_first' or 'channels_last', got 'foo'",
    ),
    "size of merged axes": (
        lambda m: SOAP(m, merge_dims=True, max_precond_dim=0),
        "max_precond_dim must be a finite number above 0, got 0",
    ),
    "structure without eigenbasis": (
        lambda m: SOAP(m, structures="triltoeplitz"),
        r"SOAPStrategy cannot use the structure 'triltoeplitz', given for 0\.weight.*It can use",
    ),
    "hierarchy in KL-Shampoo": (
        lambda m: KLShampoo(m, structures="hierarchical2_2"),
        "KLShampooStrategy cannot use.*'hierarchical2_2'",
    ),
    "structures without factors": (
        lambda m: StructuredOptimizer(m, strategy=AdamWStrategy(), structures="diagonal"),
        "AdamWStrategy has no Kronecker factors. Leave it out",
    ),
    "init_factor": (lambda m: KLShampoo(m, init_factor=0.0), r"init_factor must be a finite"),
    "coefficients": (lambda m: Muon(m, coefficient_type="quartic"), "'quartic'"),  # type: ignore[arg-type]
    "no iterations": (lambda m: Muon(m, num_ns_steps=0), "at least 1.*0"),
    "scale": (lambda m: Muon(m, scale_mode="none"), "scale_mode.*'none'"),  # type: ignore[arg-type]
    "precision": (lambda m: Muon(m, fp32_matmul_prec="low"), "fp32_matmul_prec.*'low'"),  # type: ignore[arg-type]
    "kind of decay": (
        lambda m: Muon(m, weight_decay_method="l1"),  # type: ignore[arg-type]
        "weight_decay_method.*'l1'",
    ),
    "two scales": (
        lambda m: Muon(m, scale_mode="match_rms"),  # type: ignore[arg-type]
        "scale_mode must be 'spectral', .* or 'match_rms_adamw', got 'match_rms'",
    ),
    "factor to no lr": (
        lambda m: Muon(m, lr=0.0, adamw_lr=0.1),
        r"adamw_lr=0\.1 is stored as a factor on lr.*Start with an lr above 0",
    ),
    "longest axis": (lambda m: SOAP(m, max_precond_dim=-5), "max_precond_dim must be.*-5"),
    "no longest axis": (
        lambda m: KLShampoo(m, max_precond_dim=None),  # type: ignore[arg-type]
        "max_precond_dim must be.*None",
    ),
    "text for yes or no": (
        lambda m: SOAP(m, skip_first="no"),  # type: ignore[arg-type]
        "skip_first must be True or False, got 'no'",
    ),
    "text for maximize": (
        lambda m: AdamW(m, maximize="no"),  # type: ignore[arg-type]
        "maximize must be True or False, got 'no'",
    ),
    "text for nesterov": (
        lambda m: Muon(m, nesterov="no"),  # type: ignore[arg-type]
        "nesterov must be True or False, got 'no'",
    ),
    "number for clamping": (
        lambda m: KLShampoo(m, clamping=0.5),  # type: ignore[arg-type]
        r"clamping must be True or False, got 0\.5",
    ),
    "number for always_scale": (
        lambda m: LARS(m, lr=0.1, always_scale=2),  # type: ignore[arg-type]
        "always_scale must be True or False, got 2",
    ),
    "scale factor": (
        lambda m: Muon(m, extra_scale_factor=math.nan),
        "extra_scale_factor must be.*got nan",
    ),
    "radius": (lambda m: Scion(m, radius=-1.0), r"radius must be.*got -1\.0"),
    "radius of the head": (lambda m: Scion(m, head_radius=math.inf), "radius must be.*got inf"),
    "number for a hook": (
        lambda m: Muon(m, before_weight_update=3),  # type: ignore[arg-type]
        "before_weight_update takes a function or None, got 3",
    ),
    "list of routes": (
        lambda m: Muon(m, routes=["0.weight"]),  # type: ignore[arg-type]
        r"routes must be a dict.*got \['0\.weight'\]",
    ),
    "text for a second lr": (
        lambda m: Muon(m, adamw_lr="x"),  # type: ignore[arg-type]
        "adamw_lr must be.*got 'x'",
    ),
    "unknown norm": (lambda m: ScionStrategy(norm="l7"), "norm.*'l7'"),  # type: ignore[arg-type]
    "route to an unknown name": (
        lambda m: Muon(m, routes={"0.weight": "sgd"}),
        r"routes sends '0\.weight' to 'sgd'.*'muon', 'adamw'",
    ),
    "unknown name among the strategies": (
        lambda m: StructuredOptimizer(m, strategy={"0.weight": "sgd", "default": "adamw"}),
        r"strategy= sends '0\.weight' to 'sgd', expected one of 'adamw'",
    ),
    "route of all others to an unknown name": (
        lambda m: SOAP(m, routes="sgd"),
        "routes is 'sgd', expected one of 'soap', 'adamw'",
    ),
    "route with a number as a key": (
        lambda m: SOAP(m, routes={0: "adamw"}),  # type: ignore[dict-item]
        r"routes must be a dict from roles or name patterns.*got \{0: 'adamw'\}",
    ),
    "route to a class": (
        lambda m: Muon(m, routes={"0.weight": SOAPStrategy}),  # type: ignore[dict-item]
        "class instead of an instance",
    ),
    "route of nothing": (
        lambda m: Muon(m, routes={"2.wieght": "adamw"}),
        r"'2\.wieght' match no parameter.*infer_roles\(model\)",
    ),
    "misspelt role": (
        lambda m: StructuredOptimizer(
            m, strategy={"default": AdamWStrategy(), "matrices": MuonStrategy()}
        ),
        "'matrices' match no parameter. A route's key is a role.*matrix",
    ),
    "two patterns for one": (
        lambda m: StructuredOptimizer(
            m, strategy={"default": AdamWStrategy(), "0.*": SOAPStrategy(), "*ht": SOAPStrategy()}
        ),
        r"Several routes match 0\.weight: '0\.\*', '\*ht'",
    ),
    "pattern for a part of a unit": (
        lambda m: StructuredOptimizer(
            m,
            strategy={"default": AdamWStrategy(), "0.bias": SOAPStrategy()},
            combine_params=(LinearWeightBias(), PerParameter()),
        ),
        r"'0\.bias' matches a parameter of 0\.weight \+ 0\.bias",
    ),
    "no default": (
        lambda m: StructuredOptimizer(m, strategy={"matrix": MuonStrategy()}),
        "'default' to strategies, got",
    ),
    "rule that is a number": (
        lambda m: StructuredOptimizer(
            m,
            strategy={"default": AdamWStrategy(), 3: MuonStrategy()},  # type: ignore[dict-item]
        ),
        "name patterns and 'default'",
    ),
    "class for a strategy": (
        lambda m: StructuredOptimizer(m, strategy=AdamWStrategy),  # type: ignore[arg-type]
        "class instead of an instance",
    ),
    "text for a strategy": (
        lambda m: StructuredOptimizer(m, strategy="adam"),
        "strategy= is 'adam', expected one of 'adamw'.*or a strategy",
    ),
    "no strategy": (
        lambda m: StructuredOptimizer(m, strategy=None),  # type: ignore[arg-type]
        "instance of Strategy.*got None",
    ),
    "learning rate on no device": (
        lambda m: AdamW(m, lr=torch.tensor(0.1, device="meta")),
        "lr must be",
    ),
    "number of samples in a text": (
        lambda m: StructuredOptimizer(m, strategy=AdamWStrategy(), batch_size="8"),  # type: ignore[arg-type]
        "batch_size must be.*'8'",
    ),
    "heads": (lambda m: SplitHeads("0.weight", 0), "heads must be an integer of at least 1"),
    "axis of heads": (lambda m: SplitHeads("0.weight", 2, axis=5), "axis 0 or 1"),
}


@pytest.mark.parametrize(("make", "message"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_argument_is_refused_and_the_model_left_alone(
    make: Callable[[nn.Module], Any], message: str
) -> None:
    assert_refused(make, message)

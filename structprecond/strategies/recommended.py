"""Settings that train: the best-known keywords of each optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from structprecond.core.policies import MatchRMS

# directions as large as AdamW's, so that both share one learning rate
_ORTHOGONALIZED: dict[str, Any] = {
    "lr": 0.032,
    "nesterov": True,
    "coefficient_type": "polar_express",
    "weight_decay": 0.1,
    "adamw_weight_decay": 0.1,
}

RECOMMENDED: Mapping[str, dict[str, Any]] = {
    # betas and weight decay that are common for transformers; the baseline of all comparisons
    "AdamW": {"lr": 0.016, "betas": (0.9, 0.95), "weight_decay": 0.1},
    # refreshes in every second step, staggered, follow the gradients closely; embeddings, head and
    # vectors go to AdamW
    "SOAP": {
        "lr": 0.032,
        "betas": (0.9, 0.95),
        "weight_decay": 0.1,
        "precondition_frequency": 2,
        "refresh": "staggered",
        "routes": "adamw",
    },
    # faster factors and bases than the defaults; embeddings, head and vectors go to AdamW
    "KLShampoo": {
        "lr": 0.016,
        "shampoo_beta": 0.9,
        "weight_decay": 0.1,
        "precondition_frequency": 2,
        "refresh": "staggered",
        "routes": "adamw",
    },
    "KLSOAP": {"lr": 0.016, "weight_decay": 0.1, "refresh": "staggered"},
    # nothing better than the published defaults was measured: an lr of 0.016 is better on one of
    # two models only, and routes="adamw" is worse
    "Shampoo": {},
    # from the first gradient, with directions as large as Muon's and far faster factors than the
    # published ones; embeddings, head and vectors go to AdamW. Losses that are means over tokens
    # need batch_size=get_token_count
    "SIRFShampoo": {
        "lr": 0.016,
        "beta2": 0.3,
        "lam": 2e-4,
        "init": "gradient",
        "policies": (MatchRMS(0.2),),
        "routes": "adamw",
    },
    "Muon": {**_ORTHOGONALIZED, "momentum": 0.9, "scale_mode": "match_rms_adamw"},
    # the best one of the scoreboard, with whitening="kl" by a little
    "SOAPMuon": {
        "lr": 0.032,
        "weight_decay": 0.1,
        "adamw_weight_decay": 0.1,
        "precondition_frequency": 2,
        "refresh": "staggered",
    },
    "NorMuon": {**_ORTHOGONALIZED},
    "PSGDKron": {"lr": 0.032, "weight_decay": 0.1, "routes": "adamw"},
    # nothing better than the published defaults was measured: the coefficients of "polar_express"
    # change nothing, and routes="adamw" is worse
    "Scion": {},
    # the momentum and the decay of examples/vision.py; without a decay, LARS does not scale
    "LARS": {"lr": 20.0, "momentum": 0.9, "weight_decay": 5e-4},
}
"""Keywords by the name of the optimizer, as in `Muon(model, **RECOMMENDED["Muon"])`.

Those of `AdamW`, `SOAP`, `KLShampoo`, `SIRFShampoo`, `PSGDKron`, `SOAPMuon` and `Muon` come from
the language task of docs/scoreboard.md, the others from shorter trainings: small transformers with
a linear warm-up and a linear decay to zero. Learning rates depend on the model and on the number of
steps: search around these, as in `Muon(model, **RECOMMENDED["Muon"] | {"lr": 0.01})`, and expect
larger models to want smaller ones.

Example:
    >>> from structprecond import Muon
    >>> model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    >>> optimizer = Muon(model, **RECOMMENDED["Muon"] | {"lr": 0.01})
"""

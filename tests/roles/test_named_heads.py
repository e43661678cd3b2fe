"""Output layers recognized by their names: in detectors, segmentation nets and agents."""

from __future__ import annotations

import pytest
from torch import nn

from structprecond.roles import infer_roles
from tests.roles.helpers import CONV, HEAD, LINEAR, NORM, Bag, at, check, param

FILTER = CONV | {"bias": "bias"}


@pytest.mark.parametrize(
    "name",
    ["bbox_predictor", "bbox_pred", "cls_logits", "box_predictor", "mask_predictor", "cls_score",
     "bbox_reg", "class_embed", "bbox_embed", "actor", "critic", "advantage", "value",
     "value_stream", "predict_state", "low_classifier", "high_classifier"],
)  # fmt: skip
def test_names(name: str):
    last = {"last": nn.Linear(4, 4)}
    check(Bag(**{name: nn.Linear(4, 2)}, **last), at("", **{name: HEAD}, last=LINEAR))
    layers = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    check(Bag(**{name: layers}, **last),
          at("", **{f"{name}__0": LINEAR, f"{name}__2": HEAD}, last=LINEAR))  # fmt: skip


@pytest.mark.parametrize(
    "name", ["cls_logits", "bbox_pred", "bbox_reg", "outc", "out_conv", "conv_out",
             "low_classifier", "high_classifier", "classifier", "head"],
)  # fmt: skip
@pytest.mark.parametrize("size", [1, 3])
def test_names_of_convolutions(name: str, size: int):
    roles = check(Bag(**{name: nn.Conv2d(4, 2, size)}, last=nn.Conv2d(4, 4, 3)),
                  at("", **{name: HEAD}, last=FILTER))  # fmt: skip
    assert roles[f"{name}.weight"].reason == f"convolution named {name}"


def test_dueling_network():
    """The two streams of a Q-function on top of common features."""
    streams = {name: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, n))
               for name, n in {"value": 1, "advantage": 3}.items()}  # fmt: skip
    expected = at("value", "advantage", **{"0": LINEAR, "2": HEAD})
    check(Bag(features=nn.Linear(5, 4), **streams), at("", features=LINEAR) | expected)


def test_value_of_attention_is_no_head():
    """`value` is no head in attention or next to a key."""
    names = ("query", "key", "value")
    projections = {name: nn.Linear(4, 4) for name in names}
    model = Bag(words=Bag(**projections), head=nn.Linear(4, 2))
    check(model, at("words", query=LINEAR, key=LINEAR, value=LINEAR) | at("", head=HEAD))
    layers = {f"{name}_layer": nn.Linear(4, 4) for name in names}
    model = Bag(**layers, out=nn.Linear(4, 2))
    found = infer_roles(model)
    assert [n for n, role in found.items() if role.role == "head"] == ["out.weight"]
    bare = Bag(key=param(4, 4), value=param(4, 4), out=nn.Linear(4, 2))
    check(bare, {"key": "matrix", "value": "matrix"} | at("", out=HEAD))
    check(Bag(value=param(4, 1), fc=nn.Linear(4, 4)), {"value": "head"} | at("", fc=LINEAR))


def test_class_embedding_is_no_head():
    """An embedding of classes has a name like a detector's classifier."""
    model = Bag(class_embed=nn.Embedding(9, 4), fc=nn.Linear(4, 4), out=nn.Linear(4, 2))
    check(model, {"class_embed.weight": "embedding"} | at("", fc=LINEAR, out=HEAD))


def test_innermost_name_counts():
    """A decode head has many layers; the head is its classifier."""
    decode_head = Bag(
        linear_c=nn.ModuleList([Bag(proj=nn.Linear(4, 4)), Bag(proj=nn.Linear(8, 4))]),
        linear_fuse=nn.Conv2d(8, 4, 1, bias=False),
        batch_norm=nn.BatchNorm2d(4),
        classifier=nn.Conv2d(4, 3, 1),
        aside=nn.Linear(4, 4),
    )
    check(Bag(decode_head=decode_head), at(
        "decode_head", linear_c__0__proj=LINEAR, linear_c__1__proj=LINEAR, linear_fuse=CONV,
        batch_norm=NORM, classifier=HEAD, aside=LINEAR,
    ))  # fmt: skip


def test_detector():
    """As in RetinaNet: two towers of convolutions, each with an output layer."""

    def tower(last: str, n: int) -> nn.Module:
        conv = nn.Sequential(*[nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU()) for _ in range(2)])
        return Bag(conv=conv, **{last: nn.Conv2d(4, n, 3)})

    head = Bag(classification_head=tower("cls_logits", 6), regression_head=tower("bbox_reg", 8))
    convs = {"conv__0__0": FILTER, "conv__1__0": FILTER}
    check(Bag(backbone=nn.Conv2d(3, 4, 3), head=head),
          at("", backbone=FILTER)
          | at("head.classification_head", **convs, cls_logits=HEAD)
          | at("head.regression_head", **convs, bbox_reg=HEAD))  # fmt: skip


def test_head_of_every_scale():
    """As in SSD: a list of heads, each with another number of channels."""
    lists = nn.ModuleList([nn.Conv2d(4, 6, 3), nn.Conv2d(8, 6, 3), nn.Conv2d(8, 6, 3)])
    expected = at("classification_head.module_list", **{"0": HEAD, "1": HEAD, "2": HEAD})
    check(Bag(classification_head=Bag(module_list=lists)), expected)
    # the layers of one head follow each other
    chain = nn.ModuleList([nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)])
    check(Bag(bbox_predictor=Bag(layers=chain)),
          at("bbox_predictor.layers", **{"0": LINEAR, "1": LINEAR, "2": HEAD}))  # fmt: skip


def test_conv_head_comes_before_the_classifier():
    """As in EfficientNet, with and without the layers that follow."""
    model = Bag(conv_head=nn.Conv2d(4, 8, 1, bias=False), bn2=nn.BatchNorm2d(8))
    check(model, at("", conv_head=CONV, bn2=NORM))
    model.classifier = nn.Linear(8, 3)
    check(model, at("", conv_head=CONV, bn2=NORM, classifier=HEAD))


def test_encoder_has_no_output_convolution():
    """The last convolution of an autoencoder's encoder leads to latent features."""
    parts = {name: Bag(conv_in=nn.Conv2d(4, 4, 3), conv_out=nn.Conv2d(4, 4, 3))
             for name in ("encoder", "decoder")}  # fmt: skip
    check(Bag(**parts), at("encoder", conv_in=FILTER, conv_out=FILTER)
          | at("decoder", conv_in=FILTER, conv_out=HEAD))  # fmt: skip


def test_classes():
    class LMHead(Bag):
        pass

    class OutConv(Bag):
        pass

    model = Bag(to_words=LMHead(dense=nn.Linear(4, 4), out=nn.Linear(4, 9)), last=nn.Linear(4, 4))
    check(model, at("to_words", dense=LINEAR, out=HEAD) | at("", last=LINEAR))
    roles = check(LMHead(norm=nn.LayerNorm(4), out=nn.Linear(4, 9)), at("", norm=NORM, out=HEAD))
    assert roles["out.weight"].reason == "linear layer of LMHead"
    check(OutConv(conv=nn.Conv2d(4, 2, 3)), at("conv", **{"": HEAD}))


def test_what_a_predictor_follows_is_no_head():
    """As in Mask R-CNN: a box head computes features for a box predictor."""
    box_head = Bag(fc6=nn.Linear(4, 8), fc7=nn.Linear(8, 8))
    box_predictor = Bag(cls_score=nn.Linear(8, 3), bbox_pred=nn.Linear(8, 12))
    expected = at("roi_heads.box_head", fc6=LINEAR, fc7=LINEAR)
    expected |= at("roi_heads.box_predictor", cls_score=HEAD, bbox_pred=HEAD)
    check(Bag(roi_heads=Bag(box_head=box_head, box_predictor=box_predictor)), expected)
    alone = at("roi_heads.box_head", fc6=LINEAR, fc7=HEAD)
    check(Bag(roi_heads=Bag(box_head=box_head)), alone)


@pytest.mark.parametrize("name", ["aux", "aux1", "aux_classifier", "AuxLogits"])
def test_auxiliary_heads(name: str):
    """As in GoogLeNet: they do not replace a head without a name."""
    aux = Bag(fc1=nn.Linear(4, 4), fc2=nn.Linear(4, 2))
    expected = at(name, fc1=LINEAR, fc2=HEAD)
    check(Bag(**{name: aux}, fc=nn.Linear(4, 2)), expected | at("", fc=HEAD))
    check(Bag(fc=nn.Linear(4, 2), **{name: aux}), expected | at("", fc=HEAD))
    check(Bag(fc=nn.Linear(4, 4), head=nn.Linear(4, 2), **{name: aux}),
          at("", fc=LINEAR, head=HEAD) | expected)  # fmt: skip

"""The chooser, against the scoreboard and the optimizers that it names."""

from pathlib import Path

import pytest
import torch
from torch import nn

from structprecond import SOAP, AdamW, Muon, SOAPMuon, recommend
from structprecond.errors import StructPrecondError

ROOT = Path(__file__).resolve().parents[1]


def network():
    return nn.Sequential(nn.Embedding(50, 64), *(nn.Linear(64, 64) for _ in range(4)))


def scoreboard():
    """Return steps and seconds of each optimizer of this library from the README's table."""
    text = (ROOT / "README.md").read_text()
    block = text.split("<!-- scoreboard -->")[1].split("<!-- /scoreboard -->")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in block.split("\n")]
    rows = [row for row in rows if len(row) > 1 and "(" not in row[0]][2:]
    # "-" is an optimizer that never reaches the target
    steps = {row[0]: float(row[3].split(" ")[0].replace("-", "inf")) for row in rows}
    return {row[0]: (steps[row[0]], row[4]) for row in rows}


def test_the_order_is_that_of_the_scoreboard():
    found = scoreboard()
    assert min(found, key=lambda name: found[name][0]) == "SOAPMuon, kl"
    timed = {name: float(seconds) for name, (_, seconds) in found.items() if seconds != "-"}
    assert min(timed, key=lambda name: timed[name]) == "Muon"
    assert found["SOAPMuon, kl"][0] < found["Muon"][0] < 1


def test_seconds_and_steps():
    assert recommend(network()).optimizer is Muon
    choice = recommend(network(), goal="steps")
    assert choice.optimizer is SOAPMuon
    assert choice.settings["whitening"] == "kl"
    assert "structures" not in choice.settings


def test_less_memory_gets_cheaper_structures_and_then_another_optimizer():
    model = network()
    dense = recommend(model, goal="steps").costs.state_bytes
    model.extend([nn.Linear(64, 512), nn.Linear(512, 64), nn.Linear(64, 10)])
    whole = recommend(model, goal="steps")
    blocked = recommend(model, goal="steps", memory=whole.costs.state_bytes - 1)
    assert blocked.settings["structures"] == "block128diagonal"
    assert dense < blocked.costs.state_bytes < whole.costs.state_bytes
    least = recommend(model, goal="steps", memory=blocked.costs.state_bytes - 1)
    assert least.optimizer is Muon
    assert len(least.reasons) == 4
    assert "SOAPMuon with block128diagonal would take" in str(least)
    with pytest.raises(StructPrecondError, match="No optimizer fits: SOAPMuon would take"):
        recommend(model, goal="steps", memory=least.costs.state_bytes - 1)


def test_a_model_without_hidden_matrices_gets_adamw():
    choice = recommend(nn.Sequential(nn.Embedding(9, 4), nn.LayerNorm(4)))
    assert choice.optimizer is AdamW
    assert "no hidden weight matrices" in choice.reasons[0]


def test_the_choice_trains_the_model_and_keeps_what_it_said():
    torch.manual_seed(0)
    model = network()
    choice = recommend(model, goal="steps", memory="1GiB")
    optimizer = choice(model)
    tokens = torch.arange(50)

    def loss():
        return (model(tokens) - 1).square().mean()

    before = loss().item()
    for _ in range(10):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss().item() < before / 2
    tensors = [t for bucket in optimizer.buckets for t in bucket.named_tensors().values()]
    assert choice.costs.state_bytes == sum(t.nbytes for t in tensors)


def test_the_printed_call_makes_the_same_optimizer():
    model = network()
    choice = recommend(model)
    made = eval(str(choice).split("\n")[0], {"Muon": Muon, "model": model})
    assert made.defaults == choice(model).defaults


@pytest.mark.parametrize(("text", "size"), [("2GiB", 2**31), ("500 MB", 5 * 10**8), (10**9, 10**9)])
def test_memory_is_a_number_or_a_text(text, size):
    from structprecond.tables import human

    assert f"of the {human(size)} allowed" in recommend(network(), memory=text).reasons[1]


@pytest.mark.parametrize("memory", ["2 apples", "", -1, 0, 1.5, True])
def test_other_memory_is_refused(memory):
    with pytest.raises(StructPrecondError, match="memory is a positive number of bytes"):
        recommend(network(), memory=memory)


def test_other_goals_and_models_are_refused():
    with pytest.raises(StructPrecondError, match="goal"):
        recommend(network(), goal="loss")  # type: ignore[arg-type]
    with pytest.raises(StructPrecondError, match="recommend needs the model"):
        recommend(SOAP)  # type: ignore[arg-type]

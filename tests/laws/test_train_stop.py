"""A model that has learnt its lesson by heart says it, and then stops."""

from pathlib import Path

from tests.laws.training import nano_renderer, tiny_model, train_in

from phikit.chat.message import Message
from phikit.generate.engine import Engine
from phikit.generate.request import Request
from phikit.train.optim import OptimConfig
from phikit.train.sft import SFTConfig, SFTObjective

LESSONS = {"2 + 3?": "5", "How many legs has a cat?": "A cat has 4."}


def test_a_tiny_overfit_stops(tmp_path: Path):
    renderer, model = nano_renderer(), tiny_model()
    conversations = [
        [Message("user", question), Message("assistant", answer, thinking="hm")]
        for question, answer in LESSONS.items()
    ]
    objective = SFTObjective(
        [renderer.example(messages) for messages in conversations],
        SFTConfig(examples_per_step=2, micro_examples=2),
        seed=0,
    )
    optim = OptimConfig(adam_lr=1e-2, muon_lr=0.02, decay=0.5)
    train_in(tmp_path, model, objective, optim=optim, steps=60)
    for messages in conversations:
        request = Request(
            prompt=renderer.prompt(messages[:1]),
            max_new_tokens=40,
            temperature=0.0,
            stop_ids=renderer.stop_ids,
        )
        [[reply]] = Engine(model).generate([request])
        assert reply.finish_reason == "stop"
        assert reply.tokens[-1] == renderer.stop_ids[0]
        assert renderer.parse(reply.tokens) == messages[1]

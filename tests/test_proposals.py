"""proposals: every backbone is tried before the sampler decides, and what an earlier search found is known."""

from dataclasses import replace
from typing import Any, Literal

import pytest

from mnist_dist.search_config import BackboneSpace, SearchConfig, SearchJob, SearchSpace
from mnist_dist.tuning.space import KnownResult, Proposer, is_in_space, train_job

Algorithm = Literal["tpe", "random"]
NAMES = ("mlp", "cnn", "cnn_bn")
JOB = SearchJob(
    space=SearchSpace(
        backbones=tuple(BackboneSpace(backbone=name, trained=("all",)) for name in NAMES),
        hidden_units=(0, 7),
        optimizer=("adam", "sgd", "adamw"),
        learning_rate=(1e-4, 1e-2),
    ),
    search=SearchConfig(trials=12, seed=4),
)


def searched(**fields: Any) -> SearchJob:
    return replace(JOB, search=replace(JOB.search, **fields))


def drawn(proposer: Proposer, count: int) -> list[dict[str, Any]]:
    """So many proposals, each of which came to the same."""
    proposals = []
    for number in range(count):
        proposals.append(proposer.propose(number))
        proposer.tell(number, 0.5)
    return proposals


@pytest.mark.parametrize("algorithm", ["tpe", "random"])
@pytest.mark.parametrize("seed", range(4))
def test_each_backbone_is_tried_in_the_order_of_the_space_before_the_sampler_decides(
    algorithm: Algorithm, seed: int
) -> None:
    proposals = drawn(Proposer(searched(algorithm=algorithm, seed=seed)), 3)
    assert [params["backbone"] for params in proposals] == list(NAMES)
    for params in proposals:
        assert params["learning_rate"] == pytest.approx(1e-3)
        assert (params["optimizer"], params["hidden_units"]) == ("adam", 0)
        train_job(params, JOB, stage="finalist")


def test_after_that_the_seed_decides() -> None:
    first, second = (drawn(Proposer(searched(seed=seed)), 12)[3:] for seed in (4, 5))
    assert first != second
    assert first == drawn(Proposer(searched(seed=4)), 12)[3:]


def test_backbones_without_a_trial_are_named() -> None:
    assert Proposer(searched(trials=2)).untried == ["cnn_bn"]
    assert Proposer(searched(trials=3)).untried == []
    assert Proposer(searched(trials=2, algorithm="grid")).untried == []


def known(backbone: str, accuracy: float, **params: Any) -> KnownResult:
    job = replace(JOB, space=replace(JOB.space, backbones=tuple(b for b in JOB.backbones if b.backbone == backbone)))
    return KnownResult(params={**Proposer(job).propose(0), **params}, val_accuracy=accuracy)


def test_a_backbone_that_an_earlier_search_tried_is_not_tried_again_first() -> None:
    proposals = drawn(Proposer(JOB, earlier=[known("cnn", 0.9)]), 2)
    assert [params["backbone"] for params in proposals] == ["mlp", "cnn_bn"]


def test_the_sampler_learns_from_an_earlier_search() -> None:
    earlier = [known(name, 0.99 if name == "cnn_bn" else 0.2) for name in NAMES for _ in range(12)]
    counts = [
        sum(params["backbone"] == "cnn_bn" for params in drawn(Proposer(JOB, earlier=results), 12)[3:])
        for results in ([], earlier)
    ]
    assert counts[1] > counts[0]


def test_a_resumed_search_that_knows_an_earlier_one_proposes_the_same() -> None:
    earlier = [known("cnn", 0.9), known("mlp", 0.3, learning_rate=2e-3)]
    undisturbed = drawn(Proposer(JOB, earlier=earlier), 12)
    again = Proposer(JOB, earlier=earlier)
    for number in range(5):
        assert again.propose(number, undisturbed[number]) == undisturbed[number]
        again.tell(number, 0.5)
    assert [again.propose(number) for number in range(5, 6)] == undisturbed[5:6]


@pytest.mark.parametrize(
    ("params", "is_inside"),
    [
        ({}, True),
        ({"learning_rate": 1e-2}, True),
        ({"learning_rate": 0.5}, False),
        ({"hidden_units": 8}, False),
        ({"backbone": "vgg16"}, False),
        ({"weight_decay": 1e-3}, False),
        ({"cnn.alpha": 0.5}, False),
    ],
)
def test_a_proposal_is_in_the_space_if_the_space_could_have_given_it(params: dict[str, Any], is_inside: bool) -> None:
    assert is_in_space({**known("cnn", 0.9).params, **params}, JOB) == is_inside


def test_a_proposal_without_a_parameter_of_the_space_is_outside() -> None:
    params = known("cnn", 0.9).params
    del params["dropout"]
    assert not is_in_space(params, JOB)

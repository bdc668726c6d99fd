"""The config of this study: the trainings, and the rules of the verdicts."""

from typing import Annotated, Literal

import msgspec

from experiments.config import distinct

Name = Annotated[str, msgspec.Meta(min_length=1, max_length=30)]
Positive = Annotated[float, msgspec.Meta(gt=0)]
NotNegative = Annotated[float, msgspec.Meta(ge=0)]
Count = Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]
LossName = Literal["usual", "jprob", "float64", "nudged", "usual16", "jprob16", "smoothed"]


class Training(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """An optimizer that trains several losses. Weight decay is decoupled; SGD and Lion have no eps."""

    name: Name
    operation: Literal["addition", "division"]
    layer_norm: bool
    optimizer: Literal["sgd", "adam", "lion"]
    learning_rate: Positive
    weight_decay: NotNegative
    eps: NotNegative
    losses: Annotated[list[LossName], msgspec.Meta(min_length=3, max_length=7)]

    def __post_init__(self):
        distinct(self, "losses")
        if missing := {"usual", "jprob", "float64"} - set(self.losses):
            raise ValueError(f"losses: expected usual, jprob and float64 among them, got none of {sorted(missing)}")

    def num_pairs(self, modulus: int) -> int:
        """How many pairs there are. No number is divided by 0."""
        return modulus * (modulus - (self.operation == "division"))


class Rules(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The thresholds of the verdicts: relative ones of the nll, others in log-odds, steps or points of accuracy."""

    agreement: Positive  # two trainings agree while the nll of one is so close to that of the other
    exact_to: Positive  # log-odds up to which jprob has to agree with float64
    wall_tolerance: Positive  # log-odds
    moment_tolerance: Positive  # log-odds
    spike_rise: Positive  # a spike is a rise of the nll by this factor ...
    spike_window: Count  # ... within so many steps
    spikes_below: Positive  # log-odds; above them Adam may fail for reasons that are not the loss's
    same_accuracy: Positive  # points
    alpha: Positive


class Comparison(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A paired test of the usual loss against jprob's, or the smoothed one; Holm's family is the list of them."""

    measure: Literal["spikes", "accuracy", "smoothing"]
    training: Name


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One training for each loss, optimizer and seed."""

    modulus: Annotated[int, msgspec.Meta(ge=3, le=200)]
    train_share: Annotated[float, msgspec.Meta(ge=0.1, le=0.9)]
    hidden_units: Count
    adam_b2: Annotated[float, msgspec.Meta(gt=0, lt=1)]
    num_steps: Count
    log_every: Count
    first_seed: Annotated[int, msgspec.Meta(ge=0)]
    seeds: Annotated[int, msgspec.Meta(ge=2, le=100)]
    trainings: Annotated[list[Training], msgspec.Meta(min_length=1, max_length=9)]
    rules: Rules
    family: list[Comparison]

    def __post_init__(self):
        distinct(self, "family")
        names = [training.name for training in self.trainings]
        if len(set(names)) < len(names):
            raise ValueError(f"trainings: expected distinct names, got {names}")
        if unknown := {each.training for each in self.family} - set(names):
            raise ValueError(f"family: expected trainings of {names}, got {sorted(unknown)}")
        smoothed = {training.name for training in self.trainings if "smoothed" in training.losses}
        if without := {each.training for each in self.family if each.measure == "smoothing"} - smoothed:
            raise ValueError(f"family: expected smoothed among the losses of {sorted(without)}, got none")
        is_prime = all(self.modulus % n for n in range(2, self.modulus))
        if not is_prime and any(training.operation == "division" for training in self.trainings):
            raise ValueError(f"modulus: expected a prime for division, got {self.modulus}")
        if self.rules.spike_window % self.log_every or self.num_steps % self.log_every:
            raise ValueError(f"log_every: expected a divisor of spike_window and num_steps, got {self.log_every}")

    @property
    def num_train(self) -> int:
        """How many pairs are trained on."""
        return round(self.train_share * self.modulus**2)

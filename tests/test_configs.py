"""Every config in configs/ is whole, and what it names runs at smoke size."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import msgspec
import pytest

from experiments import config, manifest, studies
from experiments.__main__ import main

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.toml"))

# The least of each study, for all its parts to run: where a study has a test with a run, the shapes of that run.
SMOKE = {
    "accuracy": ["dtypes=['float32']", "functions=['entropy']", "libraries=['jprob', 'torch']", "examples=1",
                 "num_classes=[3]"],
    "block_size": ["cells=[[4, 2, 5]]", "dtypes=['float32']", "functions=['entropy']", "block_sizes=[2]", "rounds=2"],
    "cause": ["epochs=1", "batch_size=512", "decades=[0.0, 0.5]", "widen_at_most=0", "selection_seeds=1",
              "report_seeds=2", "trained_together=4"],
    "classes": ["num_classes=[2, 3]", "num_features=2", "train_examples=20", "test_examples=20", "epochs=1",
                "batch_size=20", "decades=[0.0, 0.5]", "widen_at_most=0", "selection_seeds=1", "report_seeds=2",
                "trained_together=10"],
    "central_limit": ["num_terms=[1, 8, 16]", "draws=100"],
    "collapse": ["modulus=5", "hidden_units=3", "num_steps=100", "seeds=2",
                 "trainings=[{name='Adam', operation='division', layer_norm=true, optimizer='adam', "
                 "learning_rate=1e-3, weight_decay=0.0, eps=1e-30, "
                 "losses=['usual', 'jprob', 'float64', 'usual16', 'smoothed']}]",
                 "family=[{measure='spikes', training='Adam'}, {measure='accuracy', training='Adam'}, "
                 "{measure='smoothing', training='Adam'}]"],
    "data_sets": ["names=['wine', 'mnist1d']", "models=['linear', 'CNN']", "epochs=1", "batch_size=512",
                  "decades=[-2.0, -1.5]", "widen_at_most=0", "selection_seeds=1", "report_seeds=2",
                  "trained_together=2"],
    "distillation": ["teacher_examples=40", "hidden_units=8", "teacher_steps=60", "student_examples=20",
                     "student_steps=30", "batch_size=20", "temperatures=[1.0, 8.0]", "seeds=3"],
    "gradient_law": ["num_classes=[2]", "margin_limit=20.0", "margin_step=0.5"],
    "escape_time": ["max_margin=4.0", "margin_step=1.0", "learning_rates=[0.1]", "adam_eps=[1e-2]", "max_steps=2000"],
    "late_phase": ["other_classes=3", "learning_rate=0.1", "max_tau=100.0"],
    "likelihood": ["num_examples=11", "models=1"],
    "linear_categorical": ["cells=[[8, 7]]", "dtypes=['float32']", "rounds=2", "hidden=8", "growth_cell=[8, 7]",
                           "growth_tokens=[8, 16]", "growth_vocabularies=[7, 9]", "steps=2", "batch_size=16"],
    "loop": ["batch_sizes=[1024]", "seeds=[2]", "epochs=1", "fit_batch_size=32", "fit_steps=100", "rounds=2"],
    "efficiency": ["coefficients=[1.0, 2.0]", "num_examples=[50]", "replications=10"],
    "initialisation": ["width=8", "depth=3", "examples=8", "stds=[0.01]", "seeds=2"],
    "monte_carlo": ["num_samples=[2, 4, 8]", "draws=100", "replications=20"],
    "imbalance": ["ratios=[1, 10]", "train_examples=200", "examples_per_class=20", "num_steps=20", "log_every=10",
                  "decades=[0.0, 0.5]", "widen_at_most=0", "selection_seeds=1", "report_seeds=2",
                  "trained_together=2"],
    "label_noise": ["shares=[0.0, 0.4]", "hidden_units=4", "epochs=1", "batch_size=512", "decades=[-2.0, -1.5]",
                    "widen_at_most=0", "selection_seeds=1", "report_seeds=2", "trained_together=4"],
    "one_neuron": [],
    "plateaus": ["draws=10", "num_features=2", "hidden_units=2", "num_classes=2", "examples=2", "points=3"],
    "speed": ["functions=['cross_entropy', 'softmax']", "shapes=[[8, 3]]", "dtypes=['float32']", "rounds=2",
              "seconds_a_sample=0.0"],
    "transformer": ["layers=1", "width=4", "sequences=2", "words=2", "head_dtypes=['float32']", "rounds=2", "steps=2"],
    "walls": ["dtypes=['float32', 'float16']", "num_classes=[2]", "margin_step=0.25", "margin_limit=20.0"],
    "wrong_start": ["models=['mlp']", "optimizers=['sgd']", "other_stds=[]", "hidden_units=4", "epochs=1",
                    "batch_size=256", "sgd_decades=[0.0, 0.5]", "widen_at_most=0", "selection_seeds=1",
                    "report_seeds=2", "trained_together=4"],
}  # fmt: skip
# The last of the configs with the same studies, which differ in sizes alone: quick and full.
STUDIES = {frozenset(tomllib.loads(path.read_text()).keys() - {"backend"}): path for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_config_parses_and_its_header_says_what_it_claims_and_costs(path):
    assert config.load(path).studies
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert len(header[0]) > 20
    for word in ("Command:", "Time:", "Expected:"):
        assert any(word in line for line in header), f"{path.name}: its header does not say {word}"


MEASURED = re.compile(r"^# Measured: (?P<day>\d{4}-\d\d-\d\d), settings (?P<sha256>[0-9a-f]{12})$", re.MULTILINE)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_the_numbers_in_a_header_are_those_of_its_settings(path):
    """The hash is the first 12 digits of config.sha256 in the manifest of the run that gave the numbers."""
    found = MEASURED.findall(path.read_text())
    assert len(found) == 1, f"{path.name}: expected one line '# Measured: DAY, settings HASH'"
    assert settings_of(path) == found[0][1], f"{path.name}: its header is of other settings: measure it again"


QUOTED = [ROOT / "README.md", ROOT / "experiments/explore/wrong_start.csv", *sorted(ROOT.glob("docs/**/*.md"))]


@pytest.mark.parametrize("path", QUOTED, ids=lambda path: path.name)
def test_numbers_in_the_documentation_are_those_of_the_settings(path):
    """Numbers of a study stand under a line <!-- measured: configs/NAME.toml HASH -->."""
    for config_path, sha256 in re.findall(r"<!-- measured: (\S+) (\w+) -->", path.read_text()):
        assert settings_of(ROOT / config_path) == sha256, f"{path.name}: numbers of other settings of {config_path}"


def settings_of(path):
    return manifest.digest(msgspec.to_builtins(config.load(path).studies))[:12]


@pytest.mark.slow  # each study also has a test that runs it
@pytest.mark.parametrize(("wanted", "path"), STUDIES.items(), ids=[path.name for path in STUDIES.values()])
def test_a_config_runs_at_smoke_size(wanted, path, tmp_path, capsys):
    settings = [f"--set={name}.{item}" for name in wanted for item in SMOKE[name]]
    with jax.numpy_dtype_promotion("standard"):  # optax's adam multiplies floats by an integer count
        assert main(["run", str(path), *settings, "--out", str(tmp_path / "run")]) == 0
    assert "report.html" in capsys.readouterr().out
    page = (tmp_path / "run" / "report.html").read_text()
    for name in wanted:
        assert name in page or name.replace("_", " ").capitalize() in page


def test_every_study_has_a_config():
    assert set(studies.names()) == {name for names in STUDIES for name in names}


def test_the_study_starts_as_a_command():
    done = subprocess.run([sys.executable, "-m", "experiments", "list"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "configs/study.toml: Cross-entropy against squared error" in done.stdout
    assert all(name in done.stdout for name in studies.names())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("one_neuron.starts=[[2.0, 2.0], [2.0, 2.0]]", "one_neuron: starts: expected distinct values"),
        ("gradient_law.num_classes=[2, 2]", "gradient_law: num_classes: expected distinct values, got [2, 2]"),
        ("escape_time.learning_rates=[0.1, 0.1]", "escape_time: learning_rates: expected distinct values"),
        ("escape_time.learning_rates=[1e-300]", "escape_time.learning_rates[0]: expected float >= 1e-06, got 1e-300"),
        ("wrong_start.models=['linear', 'linear']", "wrong_start: models: expected distinct values"),
        (
            "wrong_start.sgd_decades=[1.0, -1.0]",
            "wrong_start: sgd_decades: expected the lower end first, got [1.0, -1.0]",
        ),
    ],
)
def test_settings_that_do_not_fit_together_are_refused_at_once(override, message, tmp_path, capsys):
    assert main(["run", str(ROOT / "configs/study.toml"), "--set", override, "--out", str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not (tmp_path / "run").exists()

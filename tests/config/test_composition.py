"""Every shipped option composes with every other or is refused with its own message; sources of values win in the documented order;
a run folder's config.yaml gives its configuration back."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import itertools
import shlex
import shutil
import typing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lorica import cli, composition, options
from lorica.checks import check
from lorica.config import ConfigError, NotApplicable, TrainConfig, TrainerConfig, fill_recommended
from lorica.proposals import pasted
from lorica.runs import to_yaml

OPTIONS = options.group_options()
CLASSIFIERS = {"minilm_qlora", "minilm_lora", "minilm_full", "roberta_lora", "roberta_full", "roberta_qlora"}
CAUSAL = {"mistral_lora", "mistral_qlora", "tiny_mistral_qlora"}
UNLABELLED = {"chat", "healthcare_qa", "instruction"}
NEED_A_FILE = {"classification", "instruction"}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file for the options that read anybody's files."""
    file = tmp_path_factory.mktemp("rows") / "rows.csv"
    file.write_text("text,label\na,b\n", "utf-8")
    return file


def choose(rows: Path, **groups: str) -> list[str]:
    """Overrides that choose these options, with a file where the data option needs one."""
    chosen = [f"{group}={option}" for group, option in groups.items()]
    return [*chosen, f"data.path={rows}"] if groups.get("data") in NEED_A_FILE else chosen


def compose(*args: str) -> TrainConfig:
    if "experiment=distill_sentiment" in args:
        args = (*args, f"distillation.teacher={Path(__file__).parent}")
    config = composition.compose("train", args)
    assert isinstance(config, TrainConfig)
    return config


def test_every_model_is_of_one_task() -> None:
    assert set(OPTIONS["model"]) == CLASSIFIERS | CAUSAL
    assert set(OPTIONS["data"]) > UNLABELLED | NEED_A_FILE


@pytest.mark.parametrize("model", OPTIONS["model"])
def test_classifiers_refuse_exactly_the_data_without_labels(model: str, rows: Path) -> None:
    refused = set()
    for data in OPTIONS["data"]:
        try:
            config = compose(*choose(rows, model=model, data=data))
        except ConfigError as e:
            assert not isinstance(e, NotApplicable)
            assert str(e).startswith(f"model={model}: is a classifier, and data={data} has no labels")
            assert e.fix
            refused.add(data)
        else:
            assert (config.model.name, config.data.name, config.data.module) == (model, data, data)
    assert refused == (UNLABELLED if model in CLASSIFIERS else set())


@pytest.mark.parametrize("model", ["roberta_lora", "mistral_qlora"])
def test_every_trainer_goes_with_every_logger(model: str) -> None:
    for trainer, logger in itertools.product(OPTIONS["trainer"], OPTIONS["logger"]):
        config = compose(f"model={model}", f"trainer={trainer}", f"logger={logger}")
        assert config.logger.name == logger
        assert config.trainer.strategy == ("ddp" if trainer == "ddp" else "auto")


def test_all_of_model_data_trainer_and_logger(rows: Path) -> None:
    """A group's YAML fills its own section only, so that the sections of single choices make every combination."""
    sections: dict[tuple[str, str], Any] = {}
    for group in ("model", "data", "trainer", "logger"):
        for option in OPTIONS[group]:
            sections[group, option] = getattr(composition._typed(composition.compose_tree("train", choose(rows, **{group: option}))), group)
    refused = set()
    for number, chosen in enumerate(itertools.product(*(OPTIONS[g] for g in ("model", "data", "trainer", "logger")))):
        groups = dict(zip(("model", "data", "trainer", "logger"), chosen, strict=True))
        config = TrainConfig(**{group: copy.deepcopy(sections[group, option]) for group, option in groups.items()})
        try:
            fill_recommended(config)
            check(config)
        except ConfigError as e:
            assert "is a classifier" in e.rule
            refused.add(chosen[:2])
            continue
        if number % 23 == 0:
            assert config == compose(*choose(rows, **groups))
    assert refused == set(itertools.product(CLASSIFIERS, UNLABELLED))


@pytest.mark.parametrize("experiment", OPTIONS["experiment"])
def test_every_experiment_goes_with_every_logger_and_debug(experiment: str) -> None:
    for logger in OPTIONS["logger"]:
        config = compose(f"experiment={experiment}", f"logger={logger}")
        assert config.logger.name == logger
        for debug in OPTIONS["debug"]:
            both = compose(f"experiment={experiment}", f"logger={logger}", f"debug={debug}")
            assert both.model == config.model
            assert both.logger.name == logger


@pytest.mark.parametrize("debug", OPTIONS["debug"])
def test_every_debug_goes_with_every_model_and_logger(debug: str) -> None:
    for model in OPTIONS["model"]:
        config = compose(f"model={model}", f"debug={debug}")
        if debug in ("accumulation", "resume_drill"):
            assert config.drill == debug.removesuffix("_drill") and config.trainer == compose(f"model={model}").trainer
        elif debug != "anomaly":
            assert config.trainer.max_steps in (2, 60)
            assert (config.trainer.tokens_per_batch, config.trainer.accumulate_grad_batches) == (None, 1)
    for logger in OPTIONS["logger"]:
        assert compose(f"logger={logger}", f"debug={debug}").logger.name == logger


def test_a_teacher_is_the_folder_that_a_link_names_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "latest").symlink_to("run")
    assert compose("data=sentiment", "distillation.teacher=latest").distillation.teacher == str(tmp_path / "run")
    assert compose("data=sentiment", "distillation.teacher=run").distillation.teacher == "run"


def test_the_shipped_default_needs_nothing_from_outside() -> None:
    config = compose()
    assert (config.model.name, config.data.name, config.data.source, config.logger.name) == ("minilm_lora", "ag_news", "sample", "csv")


@pytest.mark.slow
def test_trainer_keys_said_to_be_lightnings_are_lightnings() -> None:
    from lightning.pytorch import Trainer

    flags = set(inspect.signature(Trainer).parameters)
    said = {f.name for f in dataclasses.fields(TrainerConfig) if f.metadata["meaning"].startswith("Lightning:")}
    ours = {f.name for f in dataclasses.fields(TrainerConfig)}
    assert said <= flags
    assert said == ours & flags


def test_every_key_says_what_it_means() -> None:
    for verb, schema in composition.VERBS.items():
        for name, owner in options.schema_keys(schema).items():
            (field,) = (f for f in dataclasses.fields(owner) if f.name == name.rpartition(".")[2])
            assert field.metadata.get("meaning"), f"{verb}: {name}"


# ------------------------------------------------------------------------------------------------------ which source wins


def test_an_experiment_wins_over_the_model_and_the_command_line_over_both() -> None:
    recipe = compose("experiment=chatdoctor")
    assert (recipe.model.max_length, recipe.model.lora.r, recipe.optimizer.lr) == (512, 64, 2.5e-4)
    assert compose("model=mistral_qlora").model.lora.r == 16
    for args in (["experiment=chatdoctor", "model.lora.r=4"], ["model.lora.r=4", "experiment=chatdoctor"]):
        typed = compose(*args)
        assert typed.model.lora.r == 4
        assert typed.model.lora.lora_alpha == recipe.model.lora.lora_alpha == 16


def test_a_group_on_the_command_line_wins_over_the_experiments() -> None:
    for args in (["experiment=ag_news_roberta", "model=minilm_lora"], ["model=minilm_lora", "experiment=ag_news_roberta"]):
        config = compose(*args)
        assert (config.model.name, config.optimizer.lr) == ("minilm_lora", 2e-5)


def test_a_whole_model_stays_whole_under_a_recipe_with_an_adapter() -> None:
    whole = compose("experiment=ag_news_minilm", "model=minilm_full")
    assert (whole.model.name, whole.model.lora, whole.trainer.max_epochs) == ("minilm_full", None, 3)
    assert compose("experiment=ag_news_minilm", "model=minilm_full", "model.lora.r=4").model.lora.r == 4
    assert compose("experiment=ag_news_minilm", "model=minilm_full", "model={lora:{r:4}}").model.lora.r == 4
    assert compose("experiment=ag_news_minilm", "model=minilm_lora").model.lora.r == 16


def test_debug_wins_over_the_experiment() -> None:
    config = compose("experiment=sentiment_8gb", "debug=fast")
    assert (config.trainer.max_steps, config.trainer.accumulate_grad_batches) == (2, 1)
    assert compose("experiment=sentiment_8gb", "debug=fast", "trainer.max_steps=5").trainer.max_steps == 5


def test_the_last_of_two_values_wins_and_null_unchooses() -> None:
    assert compose("seed=1", "seed=2").seed == 2
    assert compose("model=roberta_lora", "model=minilm_full").model.name == "minilm_full"
    assert compose("experiment=chatdoctor", "experiment=null").model.name == "minilm_lora"
    assert compose("debug=fast", "debug=null") == compose()


def test_plus_signs_of_hydra_change_nothing() -> None:
    assert compose("+experiment=chatdoctor", "++seed=3") == compose("experiment=chatdoctor", "seed=3")


def test_what_the_page_says_of_precedence() -> None:
    assert compose("experiment=chatdoctor", "model=mistral_lora").model.lora == compose("experiment=chatdoctor").model.lora
    assert compose("model=mistral_lora").model.lora.r != 64  # type: ignore[union-attr]
    assert compose("debug=fast", "logger=wandb").logger.name == "wandb"


# -------------------------------------------------------------------------------------------------- recommended values


def test_null_is_filled_with_what_the_model_recommends() -> None:
    config = compose("model=mistral_qlora", "data=chat")
    assert (config.optimizer.name, config.optimizer.lr, config.optimizer.warmup_ratio) == ("paged_adamw_8bit", 2e-4, 0.03)
    assert (config.trainer.batch_size, config.trainer.tokens_per_batch) == (None, 4096)
    small = compose("model=roberta_full")
    assert (small.optimizer.name, small.optimizer.lr, small.trainer.batch_size) == ("adamw", 2e-5, 16)


def test_given_values_are_kept() -> None:
    config = compose(
        "model=mistral_qlora",
        "data=chat",
        "optimizer.name=sgd",
        "optimizer.lr=0.5",
        "optimizer.warmup_ratio=0.0",
        "trainer.batch_size=2",
        "trainer.gradient_checkpointing=false",
    )
    assert (config.optimizer.name, config.optimizer.lr, config.optimizer.warmup_ratio) == ("sgd", 0.5, 0.0)
    assert (config.trainer.batch_size, config.trainer.tokens_per_batch) == (2, None)
    assert config.trainer.gradient_checkpointing is False


@pytest.mark.parametrize("model", OPTIONS["model"])
def test_every_model_recommends_all_that_is_needed(model: str) -> None:
    config = compose(f"model={model}")
    assert (config.trainer.batch_size is None) != (config.trainer.tokens_per_batch is None)
    assert None not in (config.optimizer.name, config.optimizer.lr, config.optimizer.warmup_ratio)


def test_values_have_the_types_of_the_schema() -> None:
    def walk(node: Any, path: str) -> None:
        hints = typing.get_type_hints(type(node))
        for f in dataclasses.fields(node):
            value, name = getattr(node, f.name), f"{path}.{f.name}"
            if dataclasses.is_dataclass(value):
                walk(value, name)
            elif hints[f.name] is not Any:
                allowed = tuple(typing.get_origin(t) or t for t in (typing.get_args(hints[f.name]) or (hints[f.name],)))
                if typing.get_origin(hints[f.name]) is list:
                    allowed = (list,)
                assert isinstance(value, allowed) and not (isinstance(value, bool) and bool not in allowed), f"{name}={value!r}"

    for experiment in OPTIONS["experiment"]:
        walk(compose(f"experiment={experiment}"), experiment)


# ------------------------------------------------------------------------------------------------- where the YAML stands


def test_the_yaml_is_the_packages_own_in_a_wheel_and_the_clones_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clone = options.conf_dir()
    assert (clone / "train.yaml").is_file() and clone == Path(__file__).resolve().parents[2] / "conf"
    module = tmp_path / "site-packages" / "lorica" / "options.py"
    shutil.copytree(clone, module.parent / "conf")
    monkeypatch.setattr(options, "__file__", str(module))
    monkeypatch.chdir(tmp_path)
    assert options.conf_dir() == module.parent / "conf"
    assert compose("model=roberta_lora").model.name == "roberta_lora"
    (module.parent / "conf" / "model" / "added.yaml").write_text("defaults: [roberta_lora, _self_]\nname: added\n", "utf-8")
    assert compose("model=added").model.name == "added"


def test_the_folder_one_stands_in_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = compose("experiment=chatdoctor")
    monkeypatch.chdir(tmp_path)
    assert compose("experiment=chatdoctor") == here
    assert not list(tmp_path.iterdir())


def test_a_config_dir_adds_options_to_every_group(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    added = {
        "data/tweets.yaml": "defaults: [sentiment]\nname: tweets\nlabels: [bad, good]\n",
        "model/wide.yaml": "defaults: [roberta_lora]\nname: wide\nlora: {r: 64}\n",
        "trainer/short.yaml": "defaults: [default]\nmax_epochs: 1\n",
        "logger/team.yaml": "name: wandb\nproject: ours\n",
        "experiment/mine.yaml": "# @package _global_\ndefaults:\n  - override /model: wide\n  - override /data: tweets\nseed: 7\n",
        "debug/one.yaml": "# @package _global_\ntrainer: {max_steps: 1}\n",
        "notes/list.yaml": "- not a group\n",
    }
    for name, text in added.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, "utf-8")
    args = ["experiment=mine", "trainer=short", "logger=team", "debug=one"]
    config = composition.compose("train", args, str(tmp_path))
    assert (config.model.name, config.model.lora.r, config.data.name, config.data.labels) == ("wide", 64, "tweets", ["bad", "good"])
    assert (config.seed, config.trainer.max_epochs, config.trainer.max_steps, config.logger.project) == (7, 1, 1, "ours")
    assert "tweets" in options.group_options(str(tmp_path))["data"] and "notes" not in options.group_options(str(tmp_path))
    with pytest.raises(ConfigError, match="data=tweets: must be one of"):
        compose("data=tweets")
    for flag in (["--config-dir", str(tmp_path)], [f"-cd={tmp_path}"]):
        with pytest.raises(SystemExit) as end:
            cli.main("train", [*args, *flag, "--cfg", "job"])
        assert end.value.code == 0
        assert "project: ours" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main("train", ["--config-dir", str(tmp_path), "--help"])
    assert "tweets" in capsys.readouterr().out


def test_a_file_with_the_name_of_a_shipped_option_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "roberta_lora.yaml").write_text("name: roberta_lora\n", "utf-8")
    with pytest.raises(ConfigError, match="model=roberta_lora is an option of ours"):
        composition.compose("train", [], str(tmp_path))


# ------------------------------------------------------------------------------------------------------ a run's own YAML


RUNS = {
    "default": [],
    "chatdoctor": ["experiment=chatdoctor"],
    "8 GB": ["experiment=sentiment_8gb", "logger=wandb", "logger.tags=[a,'b: c']"],
    "full": ["model=roberta_full", "trainer.devices=[0,1]", "trainer.val_check_interval=0.25", "optimizer.betas=[0.8,0.95]"],
    "texts": ["model=mistral_lora", "data=ag_news", "data.prompt_template=\"Über {text}:\n'{labels}' # ${seed} \\t\"", "seed=5"],
    "numbers": ["optimizer.lr=1e-7", "optimizer.eps=1e-12", "trainer.val_check_interval=25", 'model.revision="1234567"'],
}


def run_folder(folder: Path, config: TrainConfig) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(config), "utf-8")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "step-000003.ckpt").touch()
    return folder


@pytest.mark.parametrize("args", RUNS.values(), ids=RUNS)
def test_a_run_folder_gives_its_configuration_back(args: list[str], tmp_path: Path) -> None:
    config = compose(*args)
    folder = run_folder(tmp_path / "outputs" / "run 1", config)
    again = compose(f"resume='{folder}'")
    assert again == dataclasses.replace(config, resume=str(folder), run_dir=str(folder))
    assert type(again.data) is type(config.data) and type(again.logger) is type(config.logger)
    assert to_yaml(dataclasses.replace(again, resume=None, run_dir=None)) == to_yaml(config)


def test_a_dollar_and_a_brace_in_a_text_come_back(tmp_path: Path) -> None:
    config = compose(r"data.prompt_template='\${x} {text}'")
    assert config.data.prompt_template == "${x} {text}"
    assert compose(f"resume={run_folder(tmp_path / 'run', config)}").data == config.data


def test_overrides_of_a_resumed_run_win(tmp_path: Path) -> None:
    config = compose("experiment=chatdoctor")
    folder = run_folder(tmp_path / "run", config)
    again = compose("trainer.max_steps=900", f"resume={folder}", "optimizer.lr=1e-5")
    expected = dataclasses.replace(
        config,
        resume=str(folder),
        run_dir=str(folder),
        trainer=dataclasses.replace(config.trainer, max_steps=900),
        optimizer=dataclasses.replace(config.optimizer, lr=1e-5),
    )
    assert again == expected


@pytest.mark.parametrize("group", ["model=roberta_lora", "data=chat", "trainer=cpu", "logger=csv", "experiment=chatdoctor", "debug=fast"])
def test_groups_of_a_resumed_run_can_not_be_chosen_again(group: str, tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", compose())
    with pytest.raises(ConfigError, match=f"resume=.*restores the run's own configuration; {group} can't be chosen again"):
        compose(f"resume={folder}", group)


def test_a_resumed_run_stays_in_its_folder(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", compose())
    with pytest.raises(ConfigError, match=r"run_dir=elsewhere: resume=.* goes on in that folder"):
        compose(f"resume={folder}", "run_dir=elsewhere")


def test_overrides_of_a_resumed_run_are_checked(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", compose("model=roberta_full"))
    for bad, why in (
        ("optimizer.lr=abc", "must be a number"),
        ("trainer.max_epoch=3", "trainer.max_epochs=3"),
        ("data.prompt_column=q", "not of data=ag_news"),
        ("model.lora.r=8", "model.lora is null in model=roberta_full"),
    ):
        with pytest.raises(ConfigError) as e:
            compose(f"resume={folder}", bad)
        assert bad in str(e.value) and why in str(e.value)


def test_a_finished_run_is_not_resumed(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", compose())
    (folder / "metrics.json").write_text("{}", "utf-8")
    with pytest.raises(ConfigError, match=r"^resume=.*: that run is finished"):
        compose(f"resume={folder}")


def test_a_run_without_a_checkpoint_is_not_resumed(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", compose())
    (folder / "checkpoints" / "step-000003.ckpt").unlink()
    with pytest.raises(ConfigError, match=r"^resume=.*: that run has no checkpoint to go on from"):
        compose(f"resume={folder}")


def test_a_link_to_a_run_is_resumed_where_it_points_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run_folder(tmp_path / "outputs" / "run ${x}", compose())
    (tmp_path / "outputs" / "latest").symlink_to("run ${x}", target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    config = compose("resume=outputs/latest")
    assert (config.resume, config.run_dir) == (str(folder.resolve()), str(folder.resolve()))


def test_the_last_of_two_runs_to_resume_counts(tmp_path: Path) -> None:
    first, second = (run_folder(tmp_path / name, compose(f"seed={seed}")) for name, seed in (("a", 1), ("b", 2)))
    config = compose(f"resume={first}", f"resume={second}")
    assert (config.seed, config.run_dir) == (2, str(second))


def test_words_for_resume_are_no_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for word in ("auto", "required"):
        config = compose(f"resume={word}", "model=roberta_lora")
        assert (config.resume, config.run_dir, config.model.name) == (word, None, "roberta_lora")


# ------------------------------------------------------------------------------------- texts and paths, taken as they are

SENTENCES = [
    "Isn't it?",
    "one, two",
    "Größe",
    "Wow!",
    "f(x)",
    "a=b",
    "1e3",
    "null",
    "[a",
    "{b: c",
    "${x} and ${",
    "\\${x}",
    "back\\",
    "# no comment",
    '"A" and "B"',
    "'quoted'",
    "a: b",
    "日本語",
    " padded ",
]


def ask(*args: str) -> typing.Any:
    return composition.compose("predict", ["run=.", *args])


@pytest.mark.parametrize("text", SENTENCES)
def test_a_text_to_predict_is_taken_as_it_is(text: str) -> None:
    assert ask(f"text={text}").text == text
    assert ask(f'text="{text}"').text == text  # in Hydra's quotes, as other keys have them


def test_one_pair_of_double_quotes_goes() -> None:
    assert ask('text="one, two"').text == "one, two"
    assert ask(r'text="so \"good\""').text == 'so "good"'
    assert ask('text=""so""').text == '"so"'
    assert ask("+text=so").text == "so"


def test_paths_of_predict_and_merge_are_taken_as_they_are(tmp_path: Path) -> None:
    folder = tmp_path / "Läufe, a=b (1)"
    folder.mkdir()
    (folder / "in, 1=2.csv").write_text("text\na\n", "utf-8")
    names = {"run": str(folder), "input": str(folder / "in, 1=2.csv"), "output": str(folder / "aus, ü.csv"), "base": str(folder)}
    config = composition.compose("predict", [*(f"{k}={v}" for k, v in names.items()), "text_column=Größe, cm"])
    assert {k: getattr(config, k) for k in names} == names and config.text_column == "Größe, cm"
    merge = composition.compose("merge", [f"run={folder}", f"output={folder}, 2", "base=null"])
    assert (merge.run, merge.output, merge.base) == (str(folder), f"{folder}, 2", None)


@settings(max_examples=40, deadline=None, database=None)
@given(st.text(st.characters(exclude_categories=("C", "Zl", "Zp")), min_size=1, max_size=60).filter(str.strip))
@example('"')
@example('""')
@example('"""')
@example('"so"')
@example('"A" and "B"')
@example("it's ${HOME}, \\\"!")
def test_a_printed_command_asks_the_same_text(text: str) -> None:
    from lorica.summary import _typed

    words = shlex.split(f"{_typed('run', '.')} {_typed('text', text)}")
    assert composition.compose("predict", words).text == text


TEXTS = ["a", "a b", 'say "it"', "a\\b", "end\\", '\\"', "null", "True", "1e3", "1_0", "007", "ö", "a,b", "[x]", "${y}", "x=y", "/a-1.csv"]


@pytest.mark.parametrize("value", [*TEXTS, TEXTS, ["a", "true", True, 1, 0.5, None], [["a b"], "c"], [], 7, 1e-4, False, None])
def test_a_proposal_is_read_as_the_value_it_stands_for(value: Any) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    (typed,) = shlex.split(pasted("resume", value))
    assert OverridesParser.create().parse_override(typed).value() == value

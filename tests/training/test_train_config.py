"""The configuration of a run: what is accepted, how it is refused, and what a dry run says of every recipe."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from geopd.training import load_model, plan_run
from geopd.training.config_file import config_parser, parse_config
from geopd.training.data import load_prompts
from geopd.training.planning import MemoryEstimate
from geopd.training.trainers import distillation_arguments, refuse_fsdp_on_cpu
from geopd.training.trl_arguments import OnPolicyArguments
from tiny_runs import save_model, settings

# TRL 1.16 reads the old name of this property at every rollout; nothing of ours can avoid it.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

RECIPES = Path(__file__).parents[2] / "recipes"
HERE = {"output_dir": "out", "model_name_or_path": "student"}
TEACHER = HERE | {"teacher": "teacher"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_model(folder / "student", 0)
    save_model(folder / "teacher", 1)
    return folder


def test_flags_win_over_the_file_and_every_field_of_trl_passes_through(tmp_path):
    file = tmp_path / "opd.yaml"
    file.write_text(
        yaml.safe_dump(TEACHER | {"learning_rate": 1e-5, "epsilon": 0.1, "generation_kwargs": {"top_k": 3}})
        + "use_vllm: true\nmonitor: {every: 5}\nbeta: 0.0\neval_steps: null\n"
    )
    flags = [
        "--learning_rate",
        "1e-4",
        "--vllm-mode",
        "server",
        "--teacher_server",
        '{"timeout": 5}',
        "--no_log_multimodal",
    ]
    config = parse_config("opd", flags, file)
    training = config.training
    assert (training.learning_rate, training.epsilon, training.epsilon_high) == (1e-4, 0.1, 0.28)
    assert (training.use_vllm, training.vllm_mode, training.generation_kwargs) == (True, "server", {"top_k": 3})
    assert (config.run.monitor, config.teacher.teacher_server) == ({"every": 5}, {"timeout": 5})
    assert training.log_multimodal is False


def test_defaults_are_those_of_the_paradigms():
    training = parse_config("rlvr", settings=HERE | {"reward": ["exact"]}).training
    assert (training.beta, training.num_iterations, training.loss_type, training.temperature) == (0.0, 1, "dapo", 1.0)
    assert (training.adam_beta2, training.weight_decay, training.adam_epsilon) == (0.98, 0.1, 1e-8)
    assert training.activation_checkpointing
    assert parse_config("sft", settings=HERE).training.adam_beta2 == 0.95
    older = parse_config("sft", settings=HERE | {"gradient_checkpointing": False}).training
    assert older.activation_checkpointing is False


@pytest.mark.parametrize(
    ("paradigm", "given", "match"),
    [
        ("sft", {"lerning_rate": 1e-5}, "'lerning_rate' is unknown; did you mean learning_rate"),
        ("sft", {"alpha": 0.5}, "'alpha' is unknown"),
        ("opd", {"save_strategy": False}, "save_strategy is false here: quote it"),
        ("opd", {"max_steps": 2.5}, "max_steps=2.5 is not a whole number"),
        ("opd", {"learning_rate": "fast"}, "learning_rate='fast' is not a number"),
        ("opd", {"bf16": "maybe"}, "bf16='maybe' is not a true or false"),
        ("opd", {"token_selection": "best"}, "token_selection='best' is unknown: use one of all, top-gap, random"),
        ("opd", {"reward": "exact"}, r"reward='exact': a list belongs here, such as \[exact\]"),
        ("opd", {"seed": [1, 2]}, "seed is a list"),
        ("opd", {"seed": {"a": 1}}, "seed is a mapping"),
        ("opd", {"monitor": "every"}, "monitor must be a mapping"),
        ("opd", {"monitor": "[1]"}, "monitor must be a mapping"),
        ("opd", {"monitor": "{every: [1"}, "monitor cannot be read"),
        ("opd", {"monitor": "{evry: 3}"}, "monitor: 'evry' is unknown; did you mean every"),
        ("opd", {"monitor": {"every": "3"}}, "monitor: every='3' is not a whole number"),
        ("opd", {"monitor": {"every": True}}, "monitor: every=True is not a whole number"),
        ("opd", {"monitor": {"matrices": [1]}}, r"matrices=\[1\] is not a list of values, each a text or a text"),
        ("opd", {"monitor": {"alarms": [1]}}, r"monitor: alarms=\[1\] is not a mapping"),
        ("opd", {"monitor": {"alarms": {"stop": "no"}}}, "monitor: alarms: stop='no' is not true or false"),
        ("opd", {"monitor": {"alarms": {"stable_rnk": [1, 2]}}}, "alarms: 'stable_rnk' .*did you mean stable_rank"),
        ("opd", {"monitor": {"alarms": {"stable_rank": ["a", "b"]}}}, "not a list of 2 values, each a number"),
        ("sft", {"evaluation": {"datset": "x"}}, "evaluation: 'datset' is unknown; did you mean dataset"),
        ("sft", {"evaluation": {"split": "a"}}, "evaluation names no dataset: give a text as `dataset`"),
        ("sft", {"evaluation": {"dataset": "x", "decodings": "greedy"}}, "decodings='greedy' is not a list"),
        ("opd", {"projection": {"mode": "adapter"}}, "projection names no basis: give a path as `basis`"),
        ("opd", {"projection": {"basis": "x", "modus": "mask"}}, "projection: 'modus' is unknown; did you mean mode"),
        ("opd", {"projection": {"basis": "x", "train_rest": "false"}}, "train_rest='false' is not true or false"),
        ("opd", {"teacher_server": {"time": 1}}, "teacher_server: 'time' is unknown; did you mean timeout"),
        ("opd", {"teacher_server": {"url": "http://h"}}, "teacher_server: 'url' is unknown.*it takes batch_size"),
        ("opd", {"monitor": {"origine": "x"}}, "monitor: 'origine' is unknown; did you mean origin.*takes origin, "),
        ("opd", {"teacher_server": {"style": "new"}}, "teacher_server: style='new' is not one of auto, "),
        ("opd", {"loss_type": "grpo"}, "set loss_type='dapo'"),
        ("mix", {"reward": ["exact"], "importance_sampling_level": "sequence"}, "importance_sampling_level='token'"),
        ("opd", {"rollouts": "teacher", "use_vllm": True}, "use_vllm samples from the student"),
        ("opd", {"gradient_accumulation_steps": 4, "steps_per_generation": 2}, "generation_batch_size .*to 4"),
        ("opd", {"gradient_accumulation_steps": 4, "generation_batch_size": 16}, "generation_batch_size .*to 4"),
        ("opd", {"teacher_url": "http://here"}, "not both"),
        ("opd", {"teacher": None}, "as `teacher` .* or as `teacher_url`"),
        ("opd", {"rho": 0.5}, "set top-gap or random"),
        ("opd", {"divergence": "jsd", "rollouts": "teacher"}, "rollouts go with sampled"),
        ("opd", {"divergence": "jsd", "teacher_offload": True}, "without teacher_offload"),
        ("opd", {"divergence": "jsd", "teacher": "none", "teacher_url": "http://h"}, "whole distribution"),
        ("opd", {"rollouts": "teacher", "teacher": "none", "teacher_url": "http://h"}, "give `teacher`, not"),
        ("opd", {"beta": 0.04}, "set beta=0"),
        ("opd", {"num_generations": 3}, "must be divisible by num_generations"),
        ("opd", {"output_dir": None}, "output_dir is missing"),
        ("opd", {"checkpoint_steps": [1], "checkpoint_every": 2}, "keep one of them"),
        ("opd", {"checkpoint_every": 0}, "checkpoint_every=0"),
        ("opd", {"checkpoint_steps": [-1]}, "must not be negative"),
        ("opd", {"save_steps": 100}, "save_steps: checkpoint_steps or checkpoint_every"),
        ("opd", {"resume_from_checkpoint": "x"}, "goes on by itself"),
        ("opd", {"projection": {"basis": "x"}, "use_peft": True}, "brings its own adapter"),
        ("mix", {"reward": ["exact"], "alpha": 1.0}, "alpha=1.0 is no mixture: train opd"),
        ("mix", {}, "mix needs a reward"),
        ("grpo", {}, "paradigm 'grpo' is unknown: use sft, opd, rlvr, mix"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(paradigm, given, match):
    with pytest.raises(ValueError, match=match) as error:
        parse_config(paradigm, settings=(HERE if paradigm == "sft" else TEACHER) | given)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (["--lerning_rate", "1e-5"], "--lerning_rate is unknown; did you mean learning_rate"),
        (["--learning", "1e-5"], "--learning is unknown"),
        (["stray"], "'stray' is unknown"),
        (["--seed", "one"], "invalid int value"),
        (["--seed"], "expected one argument"),
    ],
)
def test_unusable_flags_are_refused(flags, match):
    with pytest.raises(ValueError, match=match):
        parse_config("sft", flags, settings=HERE)


def test_unusable_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.yaml: no such file"):
        parse_config("sft", file=tmp_path / "nowhere.yaml")
    broken = tmp_path / "broken.yaml"
    for text, match in (("a: [1", r"broken\.yaml is not YAML"), ("- 1", r"broken\.yaml must hold a mapping")):
        broken.write_text(text)
        with pytest.raises(ValueError, match=match):
            parse_config("sft", file=broken)


def test_help_lists_own_fields_and_trls():
    for paradigm, fields in {
        "sft": ("--dataset", "--checkpoint_steps", "--packing"),
        "opd": ("--teacher_url", "--divergence", "--use_vllm", "--projection"),
        "mix": ("--alpha", "--normalise", "--num_generations"),
    }.items():
        text = config_parser(paradigm).format_help()
        assert all(field in text for field in fields)
    assert "--alpha" not in config_parser("opd").format_help()


def test_fsdp_on_cpu_is_refused(monkeypatch):
    training = parse_config("sft", settings=HERE).training
    refuse_fsdp_on_cpu(training)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="fsdp on CPU"):
        refuse_fsdp_on_cpu(training)


def test_full_divergences_take_over_what_trl_can_do_and_refuse_the_rest():
    base = TEACHER | {"divergence": "forward_kl", "temperature": 0.7, "learning_rate": 3e-5, "use_vllm": True}
    arguments = distillation_arguments(parse_config("opd", settings=base))
    assert (arguments.beta, arguments.temperature, arguments.learning_rate) == (0.0, 0.7, 3e-5)
    assert arguments.use_vllm
    assert distillation_arguments(parse_config("opd", settings=base | {"divergence": "jsd"})).beta == 0.5
    with pytest.raises(ValueError, match="epsilon belongs to the score-weighted loss"):
        distillation_arguments(parse_config("opd", settings=base | {"epsilon": 0.5}))
    with pytest.raises(ValueError, match="leave steps_per_generation"):
        distillation_arguments(parse_config("opd", settings=base | {"steps_per_generation": 4}))


def tiny_recipe(path, models, tmp_path):
    """A recipe's own settings with models, data and basis that are here; the rest is what is tested."""
    values = yaml.safe_load(path.read_text())
    values |= {"model_name_or_path": str(models / "student"), "output_dir": str(tmp_path / "run")}
    values |= {"origin": str(models / "student")} if "origin" in values else {}
    values |= {"teacher": str(models / "teacher")} if "teacher" in values else {}
    if "projection" in values:
        from geopd.training.bases_of_runs import basis_of_run
        from geopd.training.basis import write_basis

        run = tmp_path / "moved" / "checkpoint-1"
        save_model(run, 5)
        basis = write_basis(tmp_path / "basis.safetensors", basis_of_run(str(models / "student"), str(run), k=4))
        values["projection"] = values["projection"] | {"basis": str(basis)}
    if not str(values["dataset"]).startswith("problem:"):
        values["dataset"] = str(_rows(tmp_path, "messages" if path.stem == "sft" else "prompt"))
        values["reward"] = ["exact"] if path.stem != "sft" else None
        if path.stem == "sft":
            del values["reward"]
            values["dataset_form"] = None
        if "evaluation" in values:
            values["evaluation"] = values["evaluation"] | {"dataset": values["dataset"]}
    return values


def _rows(folder, form):
    """A hundred rows of text; the tiny tokenizer has no chat template."""
    file = folder / "rows.jsonl"
    problems = load_prompts("problem:arithmetic", limit=1200)
    rows = [
        {"prompt": row["prompt"], "answer": row["answer"]}
        if form == "prompt"
        else {"prompt": row["prompt"], "completion": f">{row['answer']}"}
        for row in problems
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*/*.yaml")), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_recipe_is_planned(path, models, tmp_path):
    if path.stem == "fsdp2":
        assert yaml.safe_load(path.read_text())["num_processes"] == 8
        return
    paradigm = path.stem.partition("_")[0]
    plan = plan_run(parse_config(paradigm, settings=tiny_recipe(path, models, tmp_path)), processes=8)
    assert plan.paradigm == paradigm
    assert plan.checkpoints[-1] == plan.updates
    json.dumps(plan.as_json())
    if path.parent.name == "qwen3-8b":
        assert plan.sequences == {"sft": 256, "opd": 64, "rlvr": 512}[paradigm]
        expected = {"opd": (304, 2432, 38), "rlvr": (1024, 8192, 16)}
        if plan.rollout is not None:
            assert tuple(plan.rollout[key] for key in ("prompts", "responses", "updates")) == expected[paradigm]
        assert plan.resume_every % (plan.rollout or {"updates": 1})["updates"] == 0


def test_recipes_of_the_miniature_have_its_numbers():
    from geopd.study.recipe import CORE
    from geopd.study.stage import training_settings

    for stage in CORE.stages:
        if stage.name not in ("sft", "opd", "rlvr"):
            continue
        recipe = yaml.safe_load((RECIPES / "tiny" / f"{stage.name}.yaml").read_text())
        study = training_settings(stage, Path("out"), {"start": "a"} | ({"teacher": "b"} if stage.teacher else {}))
        for key in set(recipe) & set(study) - {"model_name_or_path", "teacher", "output_dir", "seed"}:
            assert recipe[key] == study[key], (stage.name, key)
        for key in ("max_steps", "learning_rate", "warmup_steps", "adam_beta2", "checkpoint_steps"):
            assert key in recipe, (stage.name, key)


def test_steps_are_those_the_trainer_counts(models, tmp_path):
    """Against runs: two epochs of 20 demonstrations in fours, and of 12 prompts in rollouts of two."""
    from tiny_runs import run

    for paradigm, changes in (
        ("sft", {}),
        ("rlvr", {"max_steps": -1, "num_train_epochs": 2, "steps_per_generation": 2}),
    ):
        given = settings(paradigm, models, tmp_path / paradigm, **changes)
        plan = plan_run(parse_config(paradigm, settings=given))
        outcome = run(paradigm, models, tmp_path / paradigm, **changes)
        assert plan.updates == outcome.updates == outcome.history[-1]["step"]


def test_memory_adds_up(models, tmp_path):
    given = settings("opd", models, tmp_path, dtype="bfloat16", activation_checkpointing=True)
    plan = plan_run(parse_config("opd", settings=given), processes=2)
    parameters, width, layers = plan.model.parameters, 32, 2
    tokens = 4 * (8 + 6)  # four responses of six tokens behind prompts of eight
    assert plan.memory == MemoryEstimate(
        weights=2 * parameters,
        gradients=2 * parameters,
        adam=4 * parameters,
        teacher=4 * parameters,
        activations=tokens * width * 2 * (layers + 17),
    )
    assert plan.memory.sharded(2).total == plan.memory.total // 2 + plan.memory.activations // 2
    assert any("16 bits" in note for note in plan.notes)
    longer = settings("opd", models, tmp_path, teacher_offload=True)
    assert plan_run(parse_config("opd", settings=longer)).memory.teacher == 0


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"model_name_or_path": None}, "model_name_or_path is missing"),
        ({"model_name_or_path": "/nowhere/at/all"}, "/nowhere/at/all: no tokenizer to be had, there is no such folder"),
        ({"dataset": None}, "dataset is missing"),
        ({"reward": ["nothing"]}, "nothing"),
        ({"checkpoint_steps": [9]}, "step 9 of a run of 8 steps"),
        ({"resume_every": 3, "steps_per_generation": 2}, "use 2 or 4"),
        ({"max_steps": -1, "dataset_limit": 1}, "1 prompts for rollouts of 2"),
        ({"evaluation": {"dataset": "nope.jsonl"}}, r"nope\.jsonl"),
        ({"evaluation": {"dataset": "problem:arithmetic"}, "reward": None}, "no reward to judge by"),
        ({"monitor": {"every": 0}}, "every=0"),
        ({"monitor": {"matrices": ["*nothing*"]}}, r"geometry monitor: matrices=.*select none"),
        ({"monitor": {"similarity_k": 99}}, "geometry monitor: similarity_k=99"),
        ({"monitor": {"origin": "/not/here"}}, "/not/here is not on this machine"),
        ({"monitor": {"alarms": {"stop": True}}}, "set stable_rank"),
        ({"evaluation": {"dataset": "x", "decodings": ["best"]}}, "decoding 'best' is unknown"),
        ({"projection": {"basis": "/not/here"}, "weight_decay": 0.0}, "/not/here"),
        ({"divergence": "jsd", "temperature": 0.0}, r"temperature=0\.0 .*set it above 0"),
        ({"router_aux_loss_coef": 0.1}, r"router_aux_loss_coef=0\.1 .*set router_aux_loss_coef=0"),
        ({"divergence": "jsd", "epsilon": 0.5}, "epsilon belongs to the score-weighted loss"),
    ],
)
def test_a_dry_run_finds_what_is_missing(change, match, models, tmp_path):
    with pytest.raises(ValueError, match=match):
        plan_run(parse_config("opd", settings=settings("opd", models, tmp_path, **change)))


def test_the_training_arguments_of_a_run_are_its_own(models, tmp_path):
    """Resume points are set on a copy: a configuration can be used twice."""
    from geopd.training import train

    config = parse_config("rlvr", settings=settings("rlvr", models, tmp_path, max_steps=1, resume_every=1))
    assert isinstance(config.training, OnPolicyArguments)
    train(config, quiet=True)
    assert (config.training.save_steps, config.training.save_total_limit) == (500, None)


def test_a_dry_run_reads_no_weights(models, tmp_path):
    for name in ("student", "teacher"):
        shutil.copytree(models / name, tmp_path / name, ignore=shutil.ignore_patterns("*.safetensors"))
    plan = plan_run(parse_config("opd", settings=settings("opd", tmp_path, tmp_path / "run")))
    assert plan.model.parameters == sum(p.numel() for p in load_model(models / "student").parameters())
    assert plan.model.trained == plan.model.parameters
    assert not (tmp_path / "run").exists()


def test_a_dry_run_leaves_a_student_that_is_still_to_be_fetched_to_the_run(models, tmp_path, monkeypatch):
    """A hub student's config may be in the cache without its weights; an origin that nothing fetches is refused."""
    from geopd.training import watching

    cached = tmp_path / "cached"
    cached.mkdir()
    monkeypatch.setattr(watching, "local_folder", lambda name, _: cached if name == "org/student" else None)
    given = settings("opd", models, tmp_path, model_name_or_path="org/student", monitor={"every": 3})
    assert watching.monitor_of(parse_config("opd", settings=given), fetched=False) is None
    with pytest.raises(ValueError, match="org/other is not on this machine"):
        watching.monitor_of(parse_config("opd", settings=given | {"origin": "org/other"}), fetched=False)
    (cached / "model.safetensors").touch()
    assert watching.monitor_of(parse_config("opd", settings=given), fetched=False).origin == cached


def test_a_plan_says_what_it_could_not_check(models, tmp_path, monkeypatch):
    config = parse_config("opd", settings=settings("opd", models, tmp_path, monitor={"every": 3}))
    assert not any("monitor" in note for note in plan_run(config).notes)
    monkeypatch.setattr("geopd.training.run.monitor_of", lambda *_, **__: None)
    assert any("whether the monitor fits it is checked once" in note for note in plan_run(config).notes)


def test_what_trains_is_counted_with_adapters(models, tmp_path):
    lora = {"use_peft": True, "lora_r": 3, "lora_target_modules": ["q_proj", "o_proj"]}
    plan = plan_run(parse_config("opd", settings=settings("opd", models, tmp_path, **lora)))
    assert plan.model.trained == 2 * 2 * 3 * (32 + 32)  # two matrices in two layers, A and B of width 32

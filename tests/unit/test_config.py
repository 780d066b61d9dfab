"""Configs: typed, and every mistake is named with its fix."""

import math
import re
import shlex
from pathlib import Path

import pytest
import yaml
from plans import model_of, planned

from stepwiser_jax.commands.quickstart import recipe
from stepwiser_jax.config import STAGE_CONFIGS
from stepwiser_jax.config_files import dump_config, load_config
from stepwiser_jax.errors import UserError

CONFIGS = Path(__file__).parents[2] / "configs"


def stage_of(file: Path) -> str:
    return yaml.safe_load(file.read_text())["stage"]


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_shipped_configs_load_survive_a_dump_and_say_what_they_are(file, tmp_path):
    config = load_config(stage_of(file), file)
    dumped = tmp_path / "config.yaml"
    dumped.write_text(dump_config(config))
    assert load_config(stage_of(file), dumped) == config
    command, hardware, expected = file.read_text().splitlines()[:3]
    name = file.stem.split("_", 1)[1]
    written = f"# stepwiser {stage_of(file)} --config configs/{file.name} --run-dir RUNS/{name}"
    assert command == written or command.startswith(f"{written} ")
    assert hardware.startswith("# ")
    assert expected.startswith("# ")


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("qwen*_judge.yaml")), ids=lambda f: f.stem)
def test_a_judge_of_real_size_is_trained_as_in_verl_where_the_paper_is_silent(file):
    config = load_config("train-judge", file)
    optimizer, grpo = config.training.optimizer, config.grpo
    assert (optimizer.b2, optimizer.weight_decay, optimizer.schedule) == (0.999, 0.01, "constant")
    assert (grpo.kl_coef, grpo.aggregation, grpo.drop_zero_variance) == (0, "token_mean", False)
    assert (grpo.clip_eps_low, grpo.clip_eps_high) == (0.2, 0.28), "the paper's"
    with_drops = load_config("train-judge", file, ("grpo.drop_zero_variance=true",))
    assert with_drops.grpo.counts_left_out and not grpo.counts_left_out


def test_recipes_of_the_embedded_task_state_what_their_numbers_depend_on():
    """So no default moves them."""
    files = [file for kind in ("smoke", "arithmetic") for file in CONFIGS.glob(f"{kind}_*.yaml")]
    trees = [(stage_of(file), yaml.safe_load(file.read_text())) for file in files]
    trees += [(stage, tree) for _, stage, tree in recipe(Path("quickstart"), 0)]
    for stage, tree in trees:
        if "training" in tree:
            assert {"b2", "weight_decay"} <= set(tree["training"]["optimizer"]), tree
        if stage == "train-judge":
            assert {"drop_zero_variance", "denominator"} <= set(tree["grpo"]), tree
        if stage == "label":
            assert tree["dead_prefix"] == "drop", tree


def test_labels_of_real_size_are_those_of_the_paper():
    """It prints class shares that need the chunks after a prefix worth 0."""
    files = sorted(CONFIGS.glob("qwen*_labels.yaml"))
    assert len(files) == 3
    for file in files:
        assert yaml.safe_load(file.read_text())["dead_prefix"] == "negative"
        assert load_config("label", file).min_prefix_value == 0
    names = {"values": "", "rollouts": "", "tokenizer": ""}
    assert STAGE_CONFIGS["label"].model_validate(names).dead_prefix == "negative"


def documented_commands(page):
    """(stage, config, run directory, overrides) of a page's commands that are written out."""
    text = (CONFIGS.parent / page).read_text().replace("\\\n", " ")
    commands = [
        shlex.split(line)
        for line in text.splitlines()
        if re.match(r"    stepwiser [\w-]+ +--config (configs|quickstart)/", line)
    ]
    for _, stage, *words in commands:
        options = list(zip(words[::2], words[1::2], strict=True))
        overrides = tuple(value for name, value in options if name == "--set")
        yield stage, dict(options)["--config"], dict(options)["--run-dir"], overrides


@pytest.mark.parametrize(
    "page", ["docs/models.md", "docs/quickstart.md", "docs/searching.md", "docs/chunking.md"]
)
def test_documented_commands_load_and_write_each_its_own_run(page, quickstart):
    written = []
    for stage, file, run_dir, overrides in documented_commands(page):
        load_config(stage, quickstart.get(file, CONFIGS.parent / file), overrides)
        written.append(run_dir)
    assert written
    assert len(set(written)) == len(written)


def test_documented_ablations_load_and_follow_one_another(quickstart):
    """What a command reads, one before it has written."""
    written, ablated = {"RUNS/policy"}, set()
    for stage, file, run_dir, overrides in documented_commands("docs/ablations.md"):
        load_config(stage, quickstart.get(file, CONFIGS.parent / file), overrides)
        read = [value for _, _, value in (setting.partition("=") for setting in overrides)]
        unknown = {x for x in read if x.startswith(("ablations/", "RUNS/"))} - written
        assert not unknown, (run_dir, unknown)
        assert run_dir not in written
        written.add(run_dir)
        ablated |= {key for key, _, _ in (setting.partition("=") for setting in overrides)}
    assert ablated >= {
        "reward_args.format_penalty",
        "balance",
        "rule",
        "grpo.clip_eps_high",
        "chunking",
    }


PLANNED = [
    (file, topology, settings)
    for file in sorted(CONFIGS.glob("qwen*.yaml"))
    for topology, settings in planned(file.read_text())
]


def test_a_plan_is_of_the_model_that_a_recipe_begins_with():
    assert model_of(CONFIGS / "qwen2.5-7b_values.yaml") == (
        "policy.path",
        "Qwen/Qwen2.5-7B-Instruct",
    )


def test_a_file_names_its_stage_and_runs_beside_its_own(tmp_path):
    file = CONFIGS / "smoke_labels.yaml"
    config = load_config("label", file, ("tokenizer=RUNS/policy",), tmp_path / "labels")
    assert (config.values, config.rollouts) == (
        str(tmp_path / "values"),
        str(tmp_path / "rollouts"),
    )
    assert config.tokenizer == "RUNS/policy", "what is typed stays as it is"
    assert load_config("label", file).values == "RUNS/values"
    with pytest.raises(UserError, match="expected a config of train-judge, found one of label in"):
        load_config("train-judge", file)


def test_every_model_is_planned_on_every_slice():
    """Policy, values and judge of each, on 64 chips."""
    found = {(file.stem, topology) for file, topology, _ in PLANNED}
    sizes = {
        "qwen2.5-1.5b": ("v5e:8x8", "v5p:4x4x4", "v6e:8x8"),
        "qwen2.5-7b": ("v5e:8x8", "v5p:4x4x4", "v6e:8x8"),
        "qwen3-8b": ("v6e:8x8",),
    }
    assert found == {
        (f"{model}_{name}", topology)
        for model, topologies in sizes.items()
        for name in ("policy", "values", "judge")
        for topology in topologies
    }


@pytest.mark.parametrize(
    ("file", "topology", "settings"), PLANNED, ids=[f"{f.stem}-{t}" for f, t, _ in PLANNED]
)
def test_settings_for_a_slice_are_of_all_its_devices(file, topology, settings):
    config = load_config(stage_of(file), file, tuple(settings))
    chips = math.prod(map(int, topology.split(":")[1].split("x")))
    meshes = (
        [config.mesh, config.sampling_mesh] if stage_of(file) == "train-judge" else [config.mesh]
    )
    needed = 4 if stage_of(file) == "annotate" else chips  # each host samples by itself
    need = re.search(rf"^#   {topology}.*\n#     (.*)", file.read_text(), re.MULTILINE)
    assert need, "what plan says it needs"
    used, hbm = re.match(r"([\d.]+) of (\d+) GiB a chip, ", need[1]).groups()
    assert float(used) <= float(hbm)
    assert {math.prod(mesh.model_dump().values()) for mesh in meshes} == {needed}


def judge_tree(**changes):
    tree = yaml.safe_load((CONFIGS / "smoke_judge.yaml").read_text())
    return {**tree, **changes}


def load(tmp_path, tree, *overrides, stage="train-judge"):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(tree))
    return load_config(stage, file, overrides)


def test_overrides_are_typed(tmp_path):
    config = load(
        tmp_path,
        judge_tree(),
        *("training.optimizer.learning_rate=3e-5", "sampling_mesh=null"),
        "reward_args={a: 1e-3, b: -2E+2, c: 1e, d: e1}",
    )
    assert config.training.optimizer.learning_rate == 3e-5
    assert config.sampling_mesh is None
    assert config.reward_args == {"a": 0.001, "b": -200.0, "c": "1e", "d": "e1"}


@pytest.mark.parametrize(
    ("changes", "overrides", "message"),
    [
        ({"iteratoins": 3}, (), "did you mean 'iterations'"),
        ({}, ("grpo.clip_esp_low=0.1",), "did you mean 'clip_eps_low'"),
        ({}, ("iterations=many",), "iterations.*found 'many'"),
        ({}, ("iterations",), "key=value"),
        ({}, ("epochs=1",), "either iterations or epochs, found iterations and epochs: .* to null"),
        ({}, ("iterations=null",), "either iterations or epochs, found neither"),
        ({}, ("iterations.x=1",), "is a value"),
        ({"prompts_per_iteration": 7}, (), "multiple of updates_per_iteration"),
        ({}, ("training.micro_batches=3",), "multiple of training.micro_batches"),
        ({}, ("sampling.top_p=0.9",), "untruncated sampling"),
        (
            {"prompt_style": "instruct"},
            ("reward_args.format_penalty=1",),
            "analysis that prompt_style 'instruct' asks for: set prompt_style to 'verdict'",
        ),
        ({}, ("row_lengths=[64]",), r"192.*4.*32.*= 320"),
        ({}, ("engine.rows=[64, 32]",), "engine.rows: sizes must be positive and ascending"),
        ({}, ("row_lengths=[640, 320]",), "row_lengths: sizes must be positive and ascending"),
        ({}, ("model.dtype=float16",), "model.dtype: .*'float32' or 'bfloat16' .found 'float16'"),
        ({}, ("model.lora={rank: 0}",), "model.lora.rank: .* greater than or equal to 1"),
        ({}, ("model.lora={ranks: 8}",), "unknown key 'model.lora.ranks'; .* 'rank'"),
        ({}, ("engine.buckets=[200]",), r"192.*32.* = 224, found \[200\]"),
        ({}, ("mesh.data=3",), r"engine.rows \[32\] must be multiples"),
        ({}, ("mesh.fsdp=8", "training.micro_batches=4"), "micro_batches .4. x .* = 32"),
        ({}, ("iterations=[1",), "not valid YAML"),
        ({}, ("mesh.data=0",), "mesh.data: .* greater than 0 .found 0"),
        ({}, ("seed=-1",), "seed: .* greater than or equal to 0"),
        ({}, ("seed=4294967296",), "seed: .* less than 4294967296"),
        ({}, ("training.optimizer.b2=1",), "b2: .* less than 1"),
        (
            {},
            ("grpo.max_resamples=1", "grpo.drop_zero_variance=false"),
            r"max_resamples \(1\) replaces groups that are left out: set drop_zero_variance",
        ),
        ({}, ("training.optimizer.b2=-0.1",), "b2: .* greater than or equal to 0"),
        ({}, ("training.optimizer.learning_rate=.inf",), "learning_rate: .* finite"),
        ({}, ("sampling.temperature=.inf",), "temperature: .* finite"),
    ],
)
def test_mistakes_are_named(tmp_path, changes, overrides, message):
    with pytest.raises(UserError, match=message):
        load(tmp_path, judge_tree(**changes), *overrides)


@pytest.mark.parametrize(
    ("name", "stage", "override", "message"),
    [
        ("policy", "sft", "training.micro_batches=3", "batch_size. must be a multiple"),
        ("policy", "sft", "epochs=1", "either steps or epochs, found steps and epochs"),
        ("classifier", "train-classifier", "epochs=null", "either steps or epochs, found neither"),
        ("classifier", "train-classifier", "epochs=0", "epochs: .* greater than or equal to 1"),
        ("search", "search", "majority=[0]", "majority"),
        ("rollouts", "rollout", "prompt_style=verdict", "'instruct' or 'bare' .found 'verdict'"),
        ("rollouts", "rollout", "chunking=lines", "chunking: .* or a list .* .found 'lines'.$"),
        ("rollouts", "rollout", "chunking=[]", "at least 1 item"),
        ("rollouts", "rollout", "chunking=['']", "at least 1 character"),
        ("thinkprm_evaluate", "evaluate", "judge.rounds=5", "judge.rounds: .* or equal to 4"),
        ("thinkprm_evaluate", "evaluate", "judge.code_rounds=0", "judge.code_rounds'; did you"),
        ("thinkprm_evaluate", "evaluate", "judge.prompt_style=verdict", "'instruct' or 'bare'"),
        (
            "evaluate",
            "evaluate",
            "judge.kind=critic",
            "judge.kind: expected 'stepwiser', .*'critic'",
        ),
        ("search", "search", "judge.kind=genprm", "judge.kind: expected .*, found 'genprm'"),
        (
            "thinkprm_evaluate",
            "evaluate",
            "threshold_subset=gsm8k",
            "for a judge that gives steps a probability, found one of kind thinkprm",
        ),
        (
            "evaluate_classifier",
            "evaluate",
            "judge.threshold=0.4",
            "either judge.threshold, or thr",
        ),
        (
            "evaluate",
            "evaluate",
            "benchmark.shuffle=true",
            "benchmark takes source, .*found shuffle",
        ),
        ("values", "annotate", "adaptive.ruel=abs_q", "adaptive.ruel'; did you mean 'rule'"),
        (
            "values",
            "annotate",
            "num_rollouts=[[0.1, 8], [0.9, 4]]",
            "last of them 1, found",
        ),
        ("values", "annotate", "num_rollouts=[[0.9, 8], [0.1, 4], [1, 2]]", "ascending"),
        ("values", "annotate", "num_rollouts=[[1, 0]]", "greater than 0"),
        ("values", "annotate", "num_rollouts=[]", "num_rollouts: expected pairs"),
        ("genprm_rationales", "rejection-sample", "judge.code_rounds=1", "bare has no code in it"),
        (
            "genprm_rationales",
            "rejection-sample",
            "judge.turn_by_turn=false",
            "judge: .* set turn_by_turn to true",
        ),
        ("evaluate", "evaluate", "judge.kind=genprm", "set code_rounds to 0"),
        ("search", "search", "max_chunk_tokens=200", "must not exceed sampling.max_new_tokens"),
        ("search", "search", "beam={beams: 64, width: 4}", r"beam.beams \(64\) must not exceed"),
        ("search", "search", "dvts={beams: 6, width: 4}", r"beams \(6\) must be a multiple of wid"),
        (
            "search",
            "search",
            "judge=null",
            "judge is a group of settings, found None: .* judge.path",
        ),
        ("search", "search", "token_budget=0", "token_budget: .* greater than or equal to 1"),
        ("search", "search", "mesh.data=5", r": engine.rows \[32\] must be multiples"),
        ("evaluate", "evaluate", "mesh.data=5", r"judge.engine.rows \[.*\] must be multiples"),
        ("policy", "sft", "examples.shuffle=true", "takes source, limit, seed here, found shuffle"),
        ("rationales", "rejection-sample", "examples.seed=1", "takes source, limit, .*found seed"),
        ("classifier", "train-classifier", "examples.limit=1", "on_.*, exclude here, found limit"),
    ],
)
def test_mistakes_of_other_stages_are_named(name, stage, override, message):
    with pytest.raises(UserError, match=message):
        load_config(stage, CONFIGS / f"smoke_{name}.yaml", (override,))


@pytest.mark.parametrize(
    ("name", "stage", "override", "message"),
    [
        ("labels", "label", "annotations=x", "'annotations' is now values"),
        ("labels", "label", "alpha=0.4", "'alpha' is now in rule_args"),
        ("labels", "label", "best_of=4", "'best_of' is now rule_args.n"),
        ("evaluate", "evaluate", "items=x", "'items' is now benchmark.source"),
        ("evaluate", "evaluate", "genprm={}", "'genprm' is now judge, with kind: genprm"),
        (
            "evaluate",
            "evaluate",
            "judge.max_new_tokens=8",
            "'judge.max_new_tokens' is now sampling",
        ),
        ("search", "search", "classifier={}", "'classifier' is now judge, with kind: classifier"),
        ("judge", "train-judge", "grpo.max_refills=1", "'grpo.max_refills' is now max_resamples"),
        ("policy", "sft", "data={}", "'data' is now examples"),
        ("rollouts", "rollout", "problems_per_block=2", "'problems_per_block' is now block_size"),
        ("values", "annotate", "policy.compute_dtype=bfloat16", "compute_dtype' is now dtype"),
    ],
)
def test_an_old_setting_names_the_new_one(name, stage, override, message):
    with pytest.raises(UserError, match=message):
        load_config(stage, CONFIGS / f"smoke_{name}.yaml", (override,))


def test_an_old_stage_names_the_new_one(tmp_path):
    file = tmp_path / "old.yaml"
    file.write_text("stage: classify\n")
    new = "evaluate, with `judge: {kind: classifier}`"
    with pytest.raises(UserError, match=f"found one of classify in .*, which is now {new}"):
        load_config("evaluate", file)
    with pytest.raises(UserError, match=f"the stage classify is now {new}"):
        load_config("classify", file)


def test_a_judge_without_a_kind_is_stepwisers_and_a_dump_names_it(tmp_path):
    config = load_config("evaluate", CONFIGS / "smoke_evaluate.yaml")
    assert config.judge.kind == "stepwiser"
    assert "kind: stepwiser" in dump_config(config)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("rel_efective", "expected a label rule: .* did you mean 'rel_effective'"),
        ("abs_q", "a label rule 'abs_q' takes no argument 'alpha'"),
        ("nowhere_at_all:rule", "no module 'nowhere_at_all'"),
    ],
)
def test_a_label_rule_that_is_not_there_is_named(rule, message):
    overrides = (f"rule={rule}", "rule_args.alpha=0.8")
    with pytest.raises(UserError, match=message):
        load_config("label", CONFIGS / "smoke_labels.yaml", overrides)


def test_a_group_that_is_null_can_be_set(tmp_path):
    config = load_config("annotate", CONFIGS / "smoke_values.yaml", ("adaptive=null",))
    (tmp_path / "config.yaml").write_text(dump_config(config))
    config = load_config("annotate", tmp_path / "config.yaml", ("adaptive.rule=abs_q",))
    assert config.adaptive.rule == "abs_q"


def test_all_problems_come_in_one_message(tmp_path):
    tree = judge_tree(iteratoins=3)
    del tree["model"]
    with pytest.raises(UserError) as error:
        load(tmp_path, tree)
    assert "iteratoins" in str(error.value)
    assert "'model' is required" in str(error.value)


def test_missing_broken_and_unknown(tmp_path):
    with pytest.raises(UserError, match="found nothing at"):
        load_config("train-judge", tmp_path / "none.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1,")
    with pytest.raises(UserError, match="not valid YAML"):
        load_config("train-judge", tmp_path / "broken.yaml")
    (tmp_path / "latin.yaml").write_bytes("source: Zürich".encode("latin-1"))
    with pytest.raises(UserError, match="is not valid YAML in UTF-8"):
        load_config("train-judge", tmp_path / "latin.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(UserError, match="expected a mapping"):
        load_config("train-judge", tmp_path / "list.yaml")
    with pytest.raises(UserError, match="expected a stage"):
        load_config("jugde", tmp_path / "list.yaml")


def test_every_stage_has_a_command_and_a_module():
    import importlib

    from stepwiser_jax.__main__ import STAGES

    assert set(STAGES) == set(STAGE_CONFIGS)
    for name in STAGES:
        assert callable(
            importlib.import_module(f"stepwiser_jax.stages.{name.replace('-', '_')}").run
        )

import argparse
import dataclasses
import json
import re
from pathlib import Path

import pytest

import options
from data_manager import EvalOptions
from engine import resume

ANCESTORS_FLAGS = {
    "dataset": "sysu",
    "lr": "0.2",
    "optim": "adam",
    "arch": "resnet18",
    "resume": "x.t",
    "model_path": "m",
    "save_epoch": "5",
    "log_path": "l",
    "vis_log_path": "v",
    "workers": "2",
    "img_w": "72",
    "img_h": "192",
    "batch-size": "4",
    "test-batch": "16",
    "method": "agw",
    "margin": "0.5",
    "num_pos": "2",
    "trial": "3",
    "seed": "7",
    "gpu": "1",
    "mode": "indoor",
    "share_net": "3",
    "re_rank": "random_walk",
    "pcb": "off",
    "w_center": "1.5",
    "local_feat_dim": "128",
    "num_strips": "3",
    "label_smooth": "on",
}


def resolved(line=""):
    return options.resolve(options.train_parser("").parse_args(line.split()))


@pytest.mark.parametrize("spelling", ["-", "_"])
@pytest.mark.parametrize("name", ANCESTORS_FLAGS)
def test_ancestors_flags_are_honoured_in_both_spellings(name, spelling):
    value = ANCESTORS_FLAGS[name]
    flag = "--" + name.replace("_", spelling).replace("-", spelling)
    data = ["--dataset", "sysu"] if name == "mode" else []
    args, _ = options.resolve(options.train_parser("").parse_args([flag, value, *data]))
    found = getattr(args, name.replace("-", "_"))
    assert str(found) == value or found == float(value)


@pytest.mark.parametrize(
    ("line", "expected"),
    {
        "": "",
        "--dataset sysu --lr 0.1 --batch-size 6 --num_pos 8 --epochs 9 --gpu 1": "",
        "--method agw --pcb off --deterministic": "",
        "--lr 0.05 --seed 3 --milestones 20 50": "_seed3_lr0.05",
        "--preset scratch --weights none --milestones 20 40 --amp": "_scratch_milestones20-40_amp",
        "--weights a/b.pt": "_weightsa-b.pt",
        "--method agw --gem-p 10 --batch-size 8": "_gem-p10.0",  # AGW's own are 3 and 8
        "--preset strong --gem-p 10": "_strong",  # the data set's, below strong's
        "--method agw --dataset sysu --preset sysu": "_batch-size6_num-pos8",
        "--memory-levels none --w_alignment 0": "_memory-levelsnone",
        "--lr 0.05 --memory-levels none": "_memory-levelsnone_lr0.05",  # in the order of --help
        "--preset strong --gem-p 3 --img_h 288": "_strong_gem-p3.0_img-h288",
    }.items(),
)
def test_a_run_s_name_holds_what_differs_from_the_preset(line, expected):
    args, sources = resolved(line)
    assert options.distinction(args, sources) == expected


def test_a_long_name_ends_with_a_hash_that_no_trial_changes():
    line = "--seed 1 --lr 1 --w_id 3 --gem-p 4 --flip 0 --erase .5 --arch resnet18 --trial"
    names = {options.distinction(*resolved(f"{line} {t}")) for t in (1, 2)}
    (name,) = names
    assert name.startswith("_seed1_arch") and len(name) <= options.LONGEST
    assert name != options.distinction(*resolved(f"{line} 1 --pad 3"))


def test_switches_and_short_forms():
    args, _ = resolved("--tvsearch --test-only -r x")
    assert (args.direction, args.test_only, args.resume) == ("i2v", True, "x")
    assert resolved("--resume")[0].resume == options.RESUME_LAST
    assert resolved("--tvsearch True")[0].direction == "i2v"
    assert resolved("--tvsearch False")[0].direction == "v2i"
    assert resolved("--method awg")[0] == resolved("--method agw")[0]
    assert resolved("--workers 0")[0].workers == 0
    assert resolved("")[0].resume is None


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        ("regdb", (0.1, 8, 4, 10.0, 2.0, "on")),
        ("sysu", (0.1, 6, 8, 3.0, 1.0, "off")),
        ("llcm", (0.1, 6, 8, 3.0, 1.0, "off")),
    ],
)
def test_presets_are_those_of_the_table(dataset, expected):
    args, sources = resolved(f"--dataset {dataset}")
    names = ("lr", "batch_size", "num_pos", "gem_p", "w_center", "label_smooth")
    assert tuple(getattr(args, n) for n in names) == expected
    assert sources["w_center"] == f"preset {dataset}"
    assert sources["lr"] == "default"


def test_shrink_is_a_number_or_auto():
    assert resolved("")[0].shrink == 0.0025
    assert resolved("--shrink 0")[0].shrink == 0.0
    args, _ = resolved("--shrink auto --shrink-scale 2")
    assert (args.shrink, args.shrink_scale) == ("auto", 2.0)
    assert resolved("--shrink auto")[0].shrink_scale == 1.0
    with pytest.raises(ValueError, match="--shrink_scale has no effect.* is not auto"):
        resolved("--shrink-scale 2")


def test_an_explicit_flag_wins_over_any_preset():
    for preset in options.PRESETS:
        for name in ("w_center", "gem_p", "lr"):
            args, sources = resolved(f"--preset {preset} --{name} 0.75")
            assert getattr(args, name) == 0.75
            assert sources[name] == "flag"


def test_presets_name_known_flags_and_their_source():
    assert set(options.PRESETS) == set(options.PRESET_SOURCES)
    args, sources = resolved("--preset llcm")
    about = f"preset llcm ({options.PRESET_SOURCES['llcm']}); no option differs (options.json: all)"
    assert options.describe(args, sources) == about
    for values in options.PRESETS.values():
        assert set(values) <= set(options.DEFAULTS)


@pytest.mark.parametrize("line", ["--dataset sysu", "--dataset regdb --method agw"])
def test_the_strong_preset_changes_a_few_values_of_the_data_set_s(line):
    (plain, before), (strong, after) = (
        resolved(words) for words in (line, f"{line} --preset strong")
    )
    changed = {k: v for k, v in vars(strong).items() if v != vars(plain)[k]}
    few = {"img_h": 384, "erase": 0.5, "channel_aug": 0.8, "tta": "flip"}
    assert changed == {"preset": "strong", **few}
    assert {
        k: v for k, v in before.items() if k not in few | {"img_w": 144}
    }.items() <= after.items()


def test_agw_has_its_own_settings():
    args, sources = resolved("--method agw")
    assert (args.pcb, args.gem_p, args.label_smooth) == ("off", 3.0, "off")
    assert sources["gem_p"] == sources["epochs"] == "AGW"
    assert resolved("--method agw --label_smooth on")[0].label_smooth == "on"
    names = ("epochs", "batch_size", "num_pos", "share_net", "w_center", "label_smooth")
    for dataset in options.DATASETS:
        args, _ = resolved(f"--method agw --dataset {dataset}")
        assert tuple(getattr(args, n) for n in names) == (81, 8, 4, 1, 0.0, "off"), dataset
    line = "--method agw --dataset sysu --epochs 5 --batch-size 6 --share_net 2"
    args, _ = resolved(line)
    assert (args.epochs, args.batch_size, args.num_pos, args.share_net) == (5, 6, 4, 2)


def test_a_preset_that_is_named_decides_how_agw_trains_and_not_what_it_is():
    args, sources = resolved("--method agw --preset scratch")
    assert (args.epochs, args.share_net, args.label_smooth) == (14, 1, "off")
    assert sources["epochs"] == "preset scratch"
    args, _ = resolved("--method agw --dataset sysu --preset sysu")
    assert (args.epochs, args.batch_size, args.num_pos, args.w_center) == (81, 6, 8, 0.0)


def test_contradictions():
    with pytest.raises(ValueError, match="agw has no stripes: leave out --pcb on"):
        resolved("--method agw --pcb on")


def test_without_stripes_hct_keeps_its_recipe_but_for_their_triplets():
    with_stripes, without = (vars(resolved(f"--pcb {value}")[0]) for value in ("on", "off"))
    differing = {k for k, v in with_stripes.items() if without[k] != v}
    assert differing == {"pcb", "w_center"}
    assert without["w_center"] == 0.0


@pytest.mark.parametrize(
    "line",
    [
        "--dataset market",
        "--share_net 6",
        "--lr 0",
        "--lr fast",
        "--batch-size 0",
        "--shrink 2",
        "--shrink automatic",
        "--shrink-scale 0",
        "--memory-levels all",
        "--flip -0.1",
        "--re_rank yes",
        "--mode outdoor",
        "--shots 5",
        "--unknown 1",
        "--lea 3",
        "--seed -1",
        "--epochs 1.5",
        "--triplet-ramp 3",
    ],
)
def test_illegal_values_are_refused_by_the_flag_s_name(line):
    with pytest.raises(ValueError, match=f"{line.split()[0]}.*--help lists all flags"):
        resolved(line)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("--mode outdoor", "'all', 'indoor'"),
        ("--lr 0", "expected a number above 0, got 0"),
        ("--lr inf", "expected a number above 0, got inf"),
        ("--margin nan", "expected 0 or more, got nan"),
        ("--shrink 2", "expected a number from 0 to 1, got 2"),
        ("--triplet-ramp 5 3", "START <= END; got 5 3"),
        ("--bank-init features --memory-ids 206", "leave out --memory-ids"),
        ("--tvsearch yes", "expected no value, True or False, got yes"),
        ("--lr 0.1 --overwrite True", "unrecognized arguments: True; "),
        ("--tvsearch True True", "unrecognized arguments: True; "),
        ("--bacth-size 8", "unrecognized arguments: --bacth-size 8 .did you mean --batch-size"),
        ("--learning=8", "unrecognized arguments: --learning=8; "),
    ],
)
def test_errors_say_what_is_legal(line, expected):
    with pytest.raises(ValueError, match=expected):
        resolved(line)


def test_defaults_of_evaluation_are_the_same_for_training_and_testing():
    train = vars(resolved()[0])
    test = vars(options.resolve_evaluation(options.test_parser("").parse_args([])))
    for name in ("mode", "gallery", "shots", "trials", "direction", "re_rank", "test_feat"):
        assert train[name] == test[name], name
    assert train["re_rank"] == "no"


def test_the_description_holds_what_differs_from_the_preset_and_json_every_flag():
    args, sources = resolved("--data-path d --method agw --lr 0.1 --batch-size 8 --num_pos 2")
    head, *lines = options.describe(args, sources).splitlines()
    assert head.startswith("preset regdb (") and "these options differ" in head
    assert [line.split()[0] for line in lines] == [
        *("data_path", "epochs", "gem_p", "label_smooth", "method", "num_pos", "pcb", "share_net"),
        "w_center",
    ]
    assert "  epochs 81  (AGW; preset: 61)" in lines and "  num_pos 2  (flag; preset: 4)" in lines
    content = options.to_json(args)
    assert content["data_path"] == "d"
    assert content["milestones"] == [20, 50]
    assert isinstance(args, argparse.Namespace)
    assert resolved("--dataset sysu")[0].data_path == Path("data/SYSU-MM01")


@pytest.mark.parametrize(
    "line",
    [
        "--dataset llcm --lr 0.2 --milestones 3 5 --tvsearch --amp --shrink auto --shrink-scale 2",
        "--method agw --gem-p 10 --output-dir x --data-path d",  # a flag that is the preset's value
        "--memory-levels none --preset scratch",
    ],
)
def test_a_run_s_options_run_again_and_flags_beside_them_win(line, tmp_path):
    first, _ = resolved(line)
    file = tmp_path / "options.json"
    file.write_text(json.dumps({"options": options.to_json(first)}))
    again, sources = resolved(f"--options {file}")
    for name, value in vars(first).items():
        assert name in options.INCIDENTAL or getattr(again, name) == value, name
    assert sources["lr"] == "--options"
    assert again.output_dir is None
    again, sources = resolved(f"--options {file} --lr 0.75 --direction v2i")
    assert (again.lr, sources["lr"], again.direction) == (0.75, "flag", "v2i")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "No such file"),
        ("no json", "Expecting value"),
        ("[]", r"it is \[\], expected dict"),
        ("[" * 100_000, "nested too deeply"),
        ('{"options": 3}', "'options' is 3, expected dict"),
        ('{"options": {"lr": -1}}', "argument --lr: expected a number above 0"),
        ('{"options": {"rate": 1}}', "unrecognized arguments: --rate 1"),
    ],
)
def test_a_file_that_holds_no_options_is_named(content, expected, tmp_path):
    file = tmp_path / "options.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(
        ValueError, match=f"--options {file}: expected the options.json.*{expected}"
    ):
        resolved(f"--options {file}")


def test_resolving_changes_nothing_that_was_given():
    given = options.train_parser("").parse_args(["--method", "agw", "--tvsearch"])
    before = dict(vars(given))
    args, _ = options.resolve(given)
    assert vars(given) == before
    assert (args.direction, args.pcb, args.epochs) == ("i2v", "off", 81)
    given = options.test_parser("").parse_args(["--tvsearch"])
    before = dict(vars(given))
    args = options.resolve_evaluation(given)
    assert vars(given) == before
    assert (args.direction, args.data_path) == ("i2v", Path("data/RegDB"))


def test_an_evaluation_keeps_what_it_was_trained_with_unless_told():
    args = options.resolve_evaluation(options.test_parser("").parse_args([]))
    assert [args.img_h, args.img_w, args.gem_p, args.memory_variant] == [None] * 4
    assert (args.mode, args.trials, args.test_batch, args.subset) == ("all", 10, 64, "test")


def evaluation(line, trained=None):
    return options.resolve_evaluation(options.test_parser("").parse_args(line.split()), trained)


def test_an_evaluation_is_of_what_the_checkpoint_was_trained_on_unless_told():
    trained = {"dataset": "sysu", "trial": 1, "data_path": Path("here")}
    args = evaluation("--trials 3", trained)
    assert (args.dataset, args.data_path, args.trials) == ("sysu", Path("here"), 3)
    assert evaluation("--data-path there", trained).data_path == Path("there")
    args = evaluation("--dataset regdb", {**trained, "trial": 4})
    assert (args.dataset, args.data_path, args.trial) == ("regdb", Path("data/RegDB"), 1)
    assert evaluation("", {"dataset": "regdb", "trial": 4}).trial == 4
    assert evaluation("--dataset regdb --trial 2", {"dataset": "regdb", "trial": 4}).trial == 2


NO_EFFECT = {
    "--top 3": "--top has no effect, since there is no --query-dir",
    "--trials 10": "--trials has no effect, since RegDB has no such choice, and --resume no",
    "--resume a{trial}.pt --trial 2": "--trial has no effect, since {trial} in --resume stands for",
    "--mode indoor": "--mode has no effect, since RegDB has no such choice: leave it out",
    "--shots 10": "--shots has no effect, since RegDB has no such choice",
    "--gallery official": "--gallery has no effect, since RegDB has no such choice",
    "--protocol repository": "--protocol has no effect, since RegDB has no such choice",
    "--dataset llcm --mode indoor": "--mode has no effect, since LLCM has no such choice",
    "--dataset llcm --trial 2": "--trial has no effect, since LLCM has no such choice",
    "--dataset sysu --tvsearch": "--direction has no effect, since SYSU-MM01 has no such choice",
    "--dataset sysu --direction i2v": "--direction has no effect, since SYSU-MM01 has no such",
    "--dataset sysu --protocol repository": "--protocol has no effect, since SYSU-MM01 has no such",
    "--query-modality infrared": "--query_modality has no effect, since there is no --query-dir",
    "--query-dir a --mode indoor": "--mode has no effect, since your own images have no protocol",
    "--query-dir a --figures": "--figures has no effect, since your own images have no protocol",
}


@pytest.mark.parametrize("line", NO_EFFECT)
def test_flags_without_effect_on_an_evaluation_are_refused(line):
    with pytest.raises(ValueError, match=f"^{re.escape(NO_EFFECT[line])}"):
        evaluation(line)


@pytest.mark.parametrize(
    "line",
    [
        *("--dataset sysu --tvsearch", "--dataset sysu --trial 3", "--dataset llcm --shots 10"),
        *("--mode indoor", "--gallery official", "--trials 5", "--protocol repository"),
    ],
)
def test_another_data_set_s_flags_are_refused_in_training_too(line):
    with pytest.raises(ValueError, match="has no effect, since .*: leave it out"):
        resolved(line)
    resolved("--dataset sysu --trial 1 --direction v2i --tvsearch False")  # the usual values


def test_a_checkpoint_that_does_not_say_its_data_set_needs_it(caplog):
    with pytest.raises(ValueError, match=r"old.t does not say its data set: pass --dataset regdb"):
        evaluation("--resume old.t", {})
    assert evaluation("--resume old.t --dataset sysu", {}).dataset == "sysu"


def test_defaults_without_effect_are_ignored_with_one_line(caplog):
    line = "--mode all --shots 1 --tvsearch False --seed 0 --lr 0.1"
    evaluation(line)
    evaluation("--dataset sysu --trial 1 --direction v2i")
    evaluation("--dataset llcm --tvsearch --trials 5")
    evaluation("--resume a{trial}.pt --trials 10 --tvsearch True")
    assert [record.getMessage() for record in caplog.records] == [
        "no effect, since checkpoint and data set know: --lr, --seed, --mode, --shots",
        "no effect, since checkpoint and data set know: --trial, --direction",
    ]


def actions(*parsers):
    """Each flag's action by its name."""
    return {action.dest: action for parser in parsers for action in parser._actions}


def shown(value):
    """A value as one writes it on the command line."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def test_every_default_is_of_a_flag_and_shown_in_its_help():
    """Every value of a preset too."""
    train, test = (make("") for make in (options.train_parser, options.test_parser))
    assert options.DEFAULTS.keys() <= actions(train, test).keys()
    for parser in (train, test):
        parser.format_help()  # no stray percent sign
    for name, action in actions(train).items():
        if name not in options.DEFAULTS or action.nargs == 0:
            continue
        assert f"default: {shown(options.DEFAULTS[name])}" in action.help, name
        for preset, values in options.PRESETS.items():
            if name in values:
                assert f"{preset}: {shown(values[name])}" in action.help, name
    for name in ("img_h", "img_w", "gem_p", "memory_variant"):
        assert "(default: as trained)" in actions(test)[name].help


def test_flags_without_a_default_say_so_in_words():
    """Whatever takes a value, is no switch and stands in no table."""
    for name, action in actions(options.train_parser("")).items():
        if action.nargs != 0 and name not in options.DEFAULTS and name != "resume":
            assert "default: " in action.help, name


def test_a_memory_that_is_not_there_has_no_terms():
    args, sources = resolved("--memory-levels none")
    assert (args.w_alignment, args.w_decorrelation) == (0.0, 0.0)
    assert sources["w_alignment"] == "no memory"
    assert resolved("--memory-levels none --w_alignment 0")[0].w_alignment == 0.0
    assert resolved("--method agw --w_center 0")[0].w_center == 0.0


@pytest.mark.parametrize(
    ("script", "line", "reason"),
    [
        ("HCT", "--w_memory_id 1", "train_HCT.py has no memory"),
        ("HCT", "--memory-levels part", "train_HCT.py has no memory"),
        ("HCT", "--shrink 0.01", "train_HCT.py has no memory"),
        ("HCT", "--bank-init-epoch 0", "train_HCT.py has no memory"),
        ("HCT", "--memory-variant released", "train_HCT.py has no memory"),
        ("HCT", "--memory-ids 206", "train_HCT.py has no memory"),
        ("HCT", "--addressing cosine", "train_HCT.py has no memory"),
        ("MGMRA", "--temperature 0.1", "--addressing is not cosine"),
        ("SGMRA", "--bank-init-epoch 2", "--bank-init is not features"),
        ("SGMRA", "--w_alignment 1", "train_SGMRA.py has no multi-granularity memory"),
        ("SGMRA", "--memory-variant paper", "train_SGMRA.py has no multi-granularity memory"),
        ("MGMRA", "--memory-levels none --w_alignment 0.1", "--memory-levels none has no memory"),
        ("MGMRA", "--memory-levels none --shrink 0.1", "--memory-levels none has no memory"),
        ("MGMRA", "--method agw --w_center 1", "--method agw has no stripes"),
        ("MGMRA", "--method agw --local_feat_dim 8", "--method agw has no stripes"),
        ("HCT", "--pcb off --w_center 1", "--pcb off has no stripes"),
    ],
)
def test_flags_without_effect_are_refused(script, line, reason):
    flag = line.split()[-2].replace("-", "_").replace("__", "--")
    with pytest.raises(ValueError, match=f"^{flag} has no effect, since {reason}: leave it out$"):
        options.resolve(options.train_parser("").parse_args(line.split()), f"train_{script}.py")


def test_every_script_takes_its_own_flags():
    memory = "--w_memory_id 1 --memory-levels part --shrink auto --shrink-scale 2 --memory-ids 206"
    for script, line in {
        "HCT": "--w_center 3 --local_feat_dim 8",
        "SGMRA": memory,
        "MGMRA": f"{memory} --memory-variant released --w_alignment 1 --w_decorrelation 1",
    }.items():
        options.resolve(options.train_parser("").parse_args(line.split()), f"train_{script}.py")


def test_changes_on_resume_are_listed_and_some_refused():
    saved = {"lr": 0.1, "epochs": 61, "workers": 4, "trial": 1, "seed": 0, "gone": 3}
    now = {"lr": 0.05, "epochs": 61, "workers": 8, "trial": 1, "seed": 1, "new": 2}
    assert resume.changes(saved, now) == "lr 0.1 -> 0.05; seed 0 -> 1"
    for words, value in (("", False), ("--amp", True), ("--amp auto", True)):
        assert resolved(words)[0].amp is value  # as in options saved when --amp was a switch
    assert resolved("--amp fp16")[0].amp == "fp16"
    with pytest.raises(ValueError, match="changed trial 1 -> 2"):
        resume.changes(saved, {**now, "trial": 2})


def test_flags_named_in_tables_exist():
    known = actions(options.train_parser(""), options.test_parser("")).keys()
    for table in (options.PROTOCOL, resume.FREE_ON_RESUME, resume.FIXED_ON_RESUME):
        assert set(table) <= known


def test_a_protocol_has_every_option_of_an_evaluation_set():
    fields = {field.name for field in dataclasses.fields(EvalOptions)}
    assert {*options.PROTOCOL, "subset"} == fields | {"dataset", "data_path"}
    line = ["--dataset", "sysu", "--shots", "10"]
    args = options.resolve_evaluation(options.test_parser("").parse_args(line))
    given = options.protocol(args, subset="val", trials=3)
    assert given["dataset"] == "sysu"
    assert given["shots"] == 10
    assert given["trials"] == 3
    assert given["subset"] == "val"

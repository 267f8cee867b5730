"""Commands published for AGW, HCT and the MG-MRA release: what they mean here.

Those whose script has another name here are typed with ours (`SCRIPTS`); everything else is as
published. One that cannot be run as it is ends with the sentence that says what to type.
"""

import re
import shlex
from pathlib import Path

import pytest

import options
import pre_process_sysu

SCRIPTS = {  # of the ancestors -> ours
    "train.py": "train_HCT.py",  # AGW
    "train_mine.py": "train_HCT.py",  # HCT
    "test_mine_pcb.py": "test.py",
}
OURS = ("train_HCT.py", "train_SGMRA.py", "train_MGMRA.py", "test.py")
AGW = {"method": "agw", "pcb": "off", "epochs": 81, "batch_size": 8, "num_pos": 4, "share_net": 1}
AGW |= {"label_smooth": "off", "w_center": 0.0, "gem_p": 3.0}
HCT = {"method": "base", "pcb": "on", "epochs": 61, "share_net": 2, "lr": 0.1}
REGDB = {**HCT, "batch_size": 8, "num_pos": 4, "gem_p": 10.0, "w_center": 2.0, "label_smooth": "on"}
SYSU = {**HCT, "batch_size": 6, "num_pos": 8, "gem_p": 3.0, "w_center": 1.0, "label_smooth": "off"}
OF_REGDB = "--dataset regdb --lr 0.1 --gpu 0 --batch-size 8 --num_pos 4"
OF_SYSU = "--batch-size 6 --num_pos 8 --gpu 0"

COMMANDS = {
    # The MG-MRA authors' README, the first one and the later one.
    f"train_HCT.py {OF_REGDB}": REGDB,
    f"train_SGMRA.py {OF_REGDB}": REGDB,
    f"train_MGMRA.py {OF_REGDB}": REGDB,
    f"train_MGMRA.py --dataset sysu --lr 0.1 {OF_SYSU}": SYSU,
    f"train_MGMRA.py --dataset sysu --lr 0.01 {OF_SYSU}": {**SYSU, "lr": 0.01},
    # AGW's README.
    "train.py --dataset sysu --lr 0.1 --method agw --gpu 1": {**AGW, "lr": 0.1, "gpu": "1"},
    "train.py --dataset regdb --lr 0.1 --method awg --gpu 1 --trial 3": {**AGW, "trial": 3},
    "test.py --mode all --resume 'sysu_best.t' --gpu 1 --dataset sysu": {
        "mode": "all",
        "resume": "sysu_best.t",
        "direction": "v2i",
        "dataset": "sysu",
    },
    "test.py --mode all --tvsearch True --resume 'model_path' --gpu 1 --dataset regdb": {
        "direction": "i2v",
        "resume": "model_path",
        "trial": 1,
    },
    "test.py --mode indoor --resume 'sysu_best.t' --dataset sysu": {"mode": "indoor", "shots": 1},
    # HCT's README, and its baseline.
    "train_mine.py --dataset regdb --gpu 1 --pcb on --share_net 2 --w_center 2": REGDB,
    "train_mine.py --dataset sysu --lr 0.1 --pcb on --share_net 2 --w_center 1 --batch-size 6 "
    "--num_pos 8 --label_smooth off": SYSU,
    "train_mine.py --dataset regdb --pcb off": {**REGDB, "pcb": "off", "w_center": 0.0},
    "test_mine_pcb.py --mode all --tvsearch True --resume 'm.t' --gpu 1 --dataset regdb": {
        "direction": "i2v",
        "resume": "m.t",
    },
    "test.py --dataset regdb --trial 1 --tvsearch --resume m.t": {"direction": "i2v", "trial": 1},
    # What the MG-MRA release's scripts did unless told otherwise.
    "train_MGMRA.py --dataset regdb --trial 10 --memory-variant released": {**REGDB, "trial": 10},
    "test_mine_pcb.py --dataset regdb --trial 10 --re_rank k_reciprocal --resume m.t": {
        "re_rank": "k_reciprocal",
        "direction": "v2i",
    },
    # What their scripts take beside.
    "train_HCT.py --workers 0 --gpu 0,1 --resume '' --save_epoch 20 --model_path save_model/": {
        "resume": options.RESUME_LAST,
        "save_epoch": 20,
        "gpu": "0,1",
    },
    "test_mine_pcb.py --dataset sysu --lr 0.1 --optim sgd --arch resnet50 --resume m.t --test-only "
    "--model_path save_model/ --save_epoch 20 --log_path log/ --vis_log_path log/vis/ --workers 4 "
    "--img_w 144 --img_h 288 --batch-size 8 --test-batch 64 --method agw --margin 0.3 --num_pos 4 "
    "--trial 1 --seed 0 --gpu 0 --mode all --share_net 2 --re_rank no --pcb on --w_center 2.0 "
    "--local_feat_dim 256 --num_strips 6 --label_smooth on": {"dataset": "sysu", "img_h": 288},
}
SENTENCES = {
    "train_HCT.py --dataset regdb -- share_net 2": "'-- share_net' has a space: write --share_net",
    "train_MGMRA.py --method agw --pcb on": "--method agw has no stripes: leave out --pcb on",
    "train_HCT.py --method agw --w_center 2": "--w_center has no effect, since --method agw has no",
    "train_HCT.py --amp True": "expected no value, auto, bf16 or fp16, got True",
    "train_HCT.py --part 3": "unrecognized arguments: --part 3; .* --help lists all flags",
}


def resolved(command):
    script, *words = shlex.split(command)
    script = SCRIPTS.get(script, script)
    assert script in OURS
    if script == "test.py":
        return options.resolve_evaluation(options.test_parser("").parse_args(words))
    return options.resolve(options.train_parser("").parse_args(words), script)[0]


@pytest.mark.parametrize("command", COMMANDS)
def test_published_commands_mean_what_they_meant(command):
    args = vars(resolved(command))
    wanted = COMMANDS[command]
    assert {name: args[name] for name in wanted} == wanted


def test_the_page_of_commands_gives_such_as_run():
    page = (Path(options.__file__).parent / "docs/coming_from.md").read_text()
    ours = re.findall(r"^\| `python (.*?)` \| (?:`python (.*?)`|the same)", page, re.MULTILINE)
    assert len(ours) == 5
    for theirs, here in ours:
        assert vars(resolved(here or theirs))
        assert not here or vars(resolved(here)) == vars(resolved(theirs))


def test_the_caches_are_built_without_a_flag_or_the_folder_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # without data/SYSU-MM01
    with pytest.raises(SystemExit, match="2"):
        pre_process_sysu.main([])
    assert "data/SYSU-MM01" in capsys.readouterr().err


@pytest.mark.parametrize("command", SENTENCES)
def test_commands_that_cannot_run_say_what_to_type(command):
    with pytest.raises(ValueError, match=SENTENCES[command]):
        resolved(command)

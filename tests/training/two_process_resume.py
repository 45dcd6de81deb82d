"""Run under torchrun by test_train_sharded.py: a run of two processes, cut and taken up again.

two_process_resume.py FOLDER
"""

import os
import sys
import warnings
from pathlib import Path

from test_train_resume import StopAfter

from tiny_runs import run, save_model


def main() -> None:
    warnings.simplefilter("ignore")
    folder = Path(sys.argv[1])
    if os.environ["RANK"] == "0":
        save_model(folder / "student", 0)
        save_model(folder / "teacher", 1)
    from accelerate import PartialState

    PartialState(cpu=True).wait_for_everyone()
    changes = {"dataset_limit": 12, "steps_per_generation": 2, "max_steps": 8, "resume_every": 2}
    run("mix", folder, folder / "whole", **changes)
    try:
        run("mix", folder, folder / "killed", callbacks=[StopAfter(7)], **changes)
    except KeyboardInterrupt:
        PartialState().wait_for_everyone()
    assert run("mix", folder, folder / "killed", **changes).resumed_from == 6
    PartialState().wait_for_everyone()
    os._exit(0)  # all is written; taking gloo's threads down in order can wait for ever


if __name__ == "__main__":
    main()

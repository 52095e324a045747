"""How processes of a pipeline find each other."""

import os

import pytest

from rewarm.pipelines import processes


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({}, (0, 1)),
        ({"RANK": "3", "WORLD_SIZE": "8", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, (3, 8)),
        ({"SLURM_PROCID": "1", "SLURM_NTASKS": "4", "SLURM_JOB_NAME": "train"}, (1, 4)),
        # In an allocation, but not started by srun.
        ({"SLURM_NTASKS": "4"}, (0, 1)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_NAME": "interactive"}, (0, 1)),
    ],
)
def test_the_launcher_tells_how_many_ranks_there_are(monkeypatch, variables, place):
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_JOB_NAME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert processes.launched_as() == place


def test_every_stage_of_several_ranks_has_a_port_of_its_own_to_meet_at(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert processes.environment_of(None) == dict(os.environ)
    changed = dict(processes.environment_of(1234).items() - os.environ.items())
    assert changed == {"MASTER_PORT": "1234", "TORCHELASTIC_USE_AGENT_STORE": "False"}

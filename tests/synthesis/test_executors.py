"""Runs in several processes, under a stand-in for Slurm, and what Ray would be given."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from datatrove.executor import RayPipelineExecutor
from datatrove.pipeline.inference.servers import VLLMServer, vllm_server
from tests.helpers.openai_server import Scripted
from tests.synthesis.runs import all_bytes, check_complete

from fusion_hf.common.errors import InputError
from fusion_hf.synthesis.executors import make_executors
from fusion_hf.synthesis.pipeline import StageBuilder, run
from fusion_hf.synthesis.run_config import RunFolders, SynthesisConfig
from fusion_hf.synthesis.run_report import finished_report

STAGES = ["pool", "describe", "write_qa", "images", "write", "report"]
SECONDS = 300

# Runs each task of the array at once, as Slurm would some time later; keeps the scripts.
SBATCH = """#!/bin/bash
script="${@: -1}"
number=$(( $(ls "$SLURM_STAND_IN" | wc -l) + 1 ))
cp "$script" "$SLURM_STAND_IN/$number.slurm"
printf '%s\\n' "$@" > "$SLURM_STAND_IN/$number.arguments"
last=$(sed -nE 's/^#SBATCH --array=0-([0-9]+).*/\\1/p' "$script")
for argument in "$@"; do case "$argument" in --export=ALL,*) export "${argument#--export=ALL,}";; esac; done
if grep -q launch_pickled_pipeline "$script"; then
  for task in $(seq 0 "$last"); do
    SLURM_ARRAY_TASK_ID=$task SLURM_JOB_ID=$number SLURM_NODELIST=node bash "$script" > /dev/null || exit 1
  done
fi
echo "Submitted batch job $number"
"""
SRUN = """#!/bin/bash
while [[ "$1" == -* ]]; do [[ "$1" == -n ]] && shift; shift; done
exec "$@"
"""
LAUNCH = f"""#!/bin/bash
exec {sys.executable} -m datatrove.tools.launch_pickled_pipeline "$@"
"""
OPTIONS = {"time": "01:00:00", "partition": "gpu", "cpus_per_task": 2, "env_command": "true"}


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Commands of Slurm on the path; returns the folder of the submitted scripts."""
    commands, scripts = tmp_path / "bin", tmp_path / "scripts"
    commands.mkdir()
    scripts.mkdir()
    texts = {"sbatch": SBATCH, "srun": SRUN, "launch_pickled_pipeline": LAUNCH, "scontrol": "#!/bin/bash\necho node\n"}
    for name, text in texts.items():
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_STAND_IN", str(scripts))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return scripts


@pytest.mark.slow
def test_slurm(server: Scripted, config_of, slurm: Path):
    executor = {"kind": "slurm", "tasks": 2, "options": OPTIONS, "stages": {"images": {"gpus_per_task": 1}}}
    config: SynthesisConfig = config_of(server, "slurm", records=6, executor=executor)
    assert not run(config)  # it is submitted, and done by others
    check_complete(config.output / "data", 6)
    assert finished_report(config.output / "data")["records"] == 6
    scripts = [path.read_text() for path in sorted(slurm.glob("*.slurm"), key=lambda path: int(path.stem))]
    jobs = [script for script in scripts if "launch_pickled_pipeline" in script]
    assert [job.split("--job-name=synth-")[1].split("\n")[0] for job in jobs] == STAGES
    assert all("#SBATCH --kill-on-invalid-dep=yes" in job and "export LOGURU_DIAGNOSE=NO" in job for job in jobs)
    assert [("--gpus=1" in job) for job in jobs] == [stage == "images" for stage in STAGES]
    assert [("--array=0-1" in job) for job in jobs] == [stage not in ("pool", "report") for stage in STAGES]
    dependent = [path for path in slurm.glob("*.arguments") if "--dependency=afterok:" in path.read_text()]
    assert len(dependent) == len(STAGES) - 1
    local = config_of(server, "local", records=6)
    run(local)
    assert all_bytes(local.output / "data") == all_bytes(config.output / "data")
    submitted = len(list(slurm.iterdir()))
    run(config)  # nothing is left to submit
    assert len(list(slurm.iterdir())) == submitted


@pytest.mark.slow
def test_two_processes_give_the_same_bytes_as_one(server: Scripted, make_config, tmp_path: Path):
    for name, workers in (("one", 1), ("two", 2)):
        config = make_config(server, name, 12, executor={"tasks": 3, "workers": workers})
        subprocess.run([sys.executable, "-m", "fusion_hf", "synthesize", config], check=True, timeout=SECONDS)
    assert all_bytes(tmp_path / "one" / "data") == all_bytes(tmp_path / "two" / "data")
    check_complete(tmp_path / "two" / "data", 12)


@pytest.mark.slow
def test_a_failure_in_another_process_ends_the_run(server: Scripted, make_config):
    server.faults = lambda payload, repeat: "404"
    config = make_config(server, "failing", 4, executor={"tasks": 2, "workers": 2})
    command = [sys.executable, "-m", "fusion_hf", "synthesize", str(config)]
    result = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=SECONDS)
    assert result.returncode == 1
    assert "answers HTTP 404 Not Found" in result.stderr and "Traceback" not in result.stderr


def test_ray_is_given_the_same_stages(server: Scripted, config_of):
    executor = {"kind": "ray", "tasks": 4, "workers": 2, "options": {"cpus_per_task": 3}}
    config: SynthesisConfig = config_of(server, executor=executor | {"stages": {"images": {"gpus_per_task": 1}}})
    executors = make_executors(config.executor, StageBuilder(config).all(), RunFolders(config.output))
    assert all(isinstance(one, RayPipelineExecutor) for one in executors)
    assert [(one.tasks, one.workers, one.cpus_per_task) for one in executors[1:5]] == [(4, 2, 3)] * 4
    assert [one.gpus_per_task for one in executors] == [int(stage == "images") for stage in STAGES]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"options": {**OPTIONS, "cpus": 2}}, "executor.options has the unknown key 'cpus'. Did you mean"),
        ({"options": OPTIONS, "stages": {"image": {}}}, "stages has the unknown key 'image'. Did you mean 'images'"),
        ({"options": OPTIONS, "stages": {"images": {"gpu": 1}}}, "executor.stages.images has the unknown key 'gpu'"),
        ({"options": {**OPTIONS, "depends": 1}}, "executor.options has the unknown key 'depends'"),
    ],
)
def test_wrong_options_are_named(changes: dict, message: str, server: Scripted, config_of):
    config = config_of(server, executor={"kind": "slurm", "tasks": 2, **changes})
    with pytest.raises(InputError, match=message):
        make_executors(config.executor, StageBuilder(config).all(), RunFolders(config.output))


# Takes vLLM's command line and serves what the tests' author writes, until it is stopped.
VLLM = f"""#!{sys.executable}
import sys, time
from tests.synthesis.author import write
from tests.helpers.openai_server import Scripted, serve
with serve(Scripted(write), int(sys.argv[sys.argv.index("--port") + 1])):
    time.sleep({SECONDS})
"""


@pytest.mark.slow
def test_a_server_that_is_started_and_stopped(
    server: Scripted, config_of, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    commands = tmp_path / "bin"
    commands.mkdir()
    (commands / "vllm").write_text(VLLM)
    (commands / "vllm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(vllm_server, "check_required_dependencies", lambda *given: None)
    monkeypatch.setattr(VLLMServer, "_requires_dependencies", [], raising=False)
    writer = {"model": "m", "server": "vllm", "concurrency": 2, "server_arguments": {"max-model-len": 4096}}
    config = config_of(server, records=2, executor__tasks=1, writer=writer, categories={"SynthColor": 1})
    run(config)
    check_complete(config.output / "data", 2)
    assert finished_report(config.output / "data")["written"] == 2
    assert not server.requests  # the one that was started has answered

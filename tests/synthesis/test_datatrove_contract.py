"""What the data engine takes from the inside of datatrove: each name that it overrides or reads is still there."""

import asyncio
import inspect
from configparser import ConfigParser
from dataclasses import replace
from pathlib import Path
from types import FunctionType

import pytest
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.inference.checkpointing import CheckpointManager, RequestCache
from datatrove.pipeline.inference.run_inference import InferenceConfig, InferenceRunner
from datatrove.pipeline.inference.servers import InferenceServer, SGLangServer, VLLMServer
from datatrove.utils.word_tokenizers import WordTokenizer
from packaging.requirements import Requirement

from fusion_hf.synthesis import request_step
from fusion_hf.synthesis.executors import LocalExecutor
from fusion_hf.synthesis.filters.minhash import NEARLY, NearDuplicatesFilter, _WhitespaceTokenizer
from fusion_hf.synthesis.progress import Progress
from fusion_hf.synthesis.request_step import RequestStep
from fusion_hf.synthesis.rollouts import DescribeRollout
from fusion_hf.synthesis.run_config import EndpointSettings

# ours -> datatrove's, and every name of datatrove's that ours defines as well
OVERRIDDEN = {
    RequestStep: (InferenceRunner, {"__init__", "run", "_init_server", "_save_document"}),
    request_step._Checkpoints: (CheckpointManager, {"update_last_chunk_index"}),
    request_step._ChatServer: (InferenceServer, {"__init__", "_make_request", "server_cleanup"}),
    request_step._RunningServer: (InferenceServer, {"start_server", "monitor_health", "_wait_until_ready"}),
    request_step._StartedVLLM: (VLLMServer, set()),
    request_step._StartedSGLang: (SGLangServer, set()),
    LocalExecutor: (LocalPipelineExecutor, {"__init__", "_run_for_rank"}),
    _WhitespaceTokenizer: (WordTokenizer, {"word_tokenize", "sent_tokenize", "span_tokenize"}),
}
OWN_SETTINGS = {
    "_ChatServer.__init__",
    "RequestStep.__init__",
    "LocalExecutor.__init__",
}  # take other arguments on purpose


def methods(kind: type) -> set[str]:
    return {name for name, value in vars(kind).items() if isinstance(value, FunctionType)}


@pytest.mark.parametrize("ours", OVERRIDDEN, ids=lambda kind: kind.__name__)
def test_what_is_overridden_is_datatroves(ours: type):
    theirs, names = OVERRIDDEN[ours]
    assert issubclass(ours, theirs)
    assert {name for name in methods(ours) if hasattr(theirs, name)} == names
    private = {name for name in methods(ours) if name.startswith("_") and not hasattr(theirs, name)}
    assert private <= {"_failed_documents"}, "a private name that datatrove does not have (any more)"


@pytest.mark.parametrize("ours", OVERRIDDEN, ids=lambda kind: kind.__name__)
def test_what_is_overridden_takes_the_same_arguments(ours: type):
    theirs, names = OVERRIDDEN[ours]
    for name in names:
        if f"{ours.__name__}.{name}" in OWN_SETTINGS:
            continue
        own, other = (inspect.signature(getattr(kind, name)).parameters for kind in (ours, theirs))
        takes_any = any(each.kind is each.VAR_POSITIONAL for each in own.values())
        assert takes_any or list(own) == list(other), name
        assert inspect.iscoroutinefunction(getattr(ours, name)) == inspect.iscoroutinefunction(getattr(theirs, name))


def make_step(folder: Path) -> RequestStep:
    endpoint = EndpointSettings("a-model", "http://localhost:1")
    rollout = DescribeRollout(endpoint, Progress(folder, "describe"))
    return RequestStep("describe", rollout, folder / "out", folder / "marks", 5)


def test_what_is_read_of_a_runner_and_its_checkpoints_is_there(tmp_path: Path):
    step = make_step(tmp_path)
    assert isinstance(step, PipelineStep) and isinstance(step.checkpoint_manager, request_step._Checkpoints)
    assert isinstance(step.config, InferenceConfig) and isinstance(step.request_cache, RequestCache)
    assert step.stats["failed_documents"].total == 0
    checkpoints, plain = step.checkpoint_manager, CheckpointManager(str(tmp_path), 5)
    assert vars(checkpoints).keys() == vars(plain).keys()
    assert checkpoints.request_cache is step.request_cache and checkpoints.last_chunk_index == -1
    for name in ("checkpoint_file_lock", "file_locks", "per_chunk_counts", "new_completed_chunks"):
        assert hasattr(checkpoints, name), name
    assert Path(checkpoints.checkpoints_local_dir) == tmp_path / "marks"
    assert inspect.iscoroutinefunction(RequestCache.drop_chunk)


def test_what_is_read_of_a_server_is_there(tmp_path: Path):
    async def make() -> InferenceServer:  # datatrove makes it in a loop
        return make_step(tmp_path)._init_server(0)

    server = asyncio.run(make())
    assert isinstance(server, request_step._RunningServer)
    assert server.url == "http://localhost:1" and server.client.tries == 8
    assert callable(InferenceServer.get_base_url)


def test_what_is_read_of_minhash_is_there():
    signer = NearDuplicatesFilter(replace(NEARLY, num_buckets=3, hashes_per_bucket=2)).signer
    signature = signer.get_signature(signer.get_shingles("two red birds on a wire"))
    assert [len(hashes) for hashes in signature] == [2, 2, 2]


def test_other_releases_of_datatrove_are_not_installed():
    setup = ConfigParser()
    setup.read(Path(__file__).parents[2] / "setup.cfg")
    lines = [line.partition("#")[0] for line in setup["options.extras_require"]["synth"].splitlines()]
    (needed,) = [Requirement(line) for line in lines if line.startswith("datatrove")]
    assert needed.specifier.contains("0.10.1") and not needed.specifier.contains("0.11.0")

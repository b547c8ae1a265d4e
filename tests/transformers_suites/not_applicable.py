"""The tests of transformers' suites that cannot apply to FUSION, by name, and why.

Two suites are not in transformers' source distribution and have no entry here: GenerationTesterMixin, whose ground
`test_generation_ground.py` covers, and the pipelines' tests behind PipelineTesterMixin (`tests/hub` has ours).
Tried by hand on the six backbones with a copy near 5.16, GenerationTesterMixin's tests pass, but for those that give
`inputs_embeds` with an image (image tokens are found by their ids, which embeddings do not have) and
`test_left_padding_compatibility`: it prepends padding and does not move `prompt_end_positions`; with the suite's own
hook for such inputs it passes.
Tests that skip themselves (no accelerator, no mixture of experts, no video, ...) have none either.
"""

import transformers
from packaging.version import Version

AS_ABOVE = "as the test above"

NOT_APPLICABLE = {
    # ModelTesterMixin
    "test_generation_tester_mixin_inheritance": (
        "it asks for GenerationTesterMixin, which transformers' source distribution lacks; in its place: "
        "test_generation_ground.py"
    ),
    # ImageProcessingTestMixin
    "test_call_numpy_4_channels": (
        "it normalises four channels, but the tower reads three and a fourth is dropped; in its place: "
        "test_fourth_channel_is_dropped"
    ),
    "test_new_models_require_torchvision_backend": (
        "it is transformers' rule for new models of its own; FUSION's tiles are PIL's to the byte, and the suite "
        "itself lets the results of two backends differ (backend_equivalence_atol)"
    ),
    # ProcessorTesterMixin
    "test_processor_from_and_save_pretrained": (
        "save_pretrained of a class that is registered for the auto classes adds auto_map to the saved instance, and "
        "from_pretrained drops it, so that the two differ whatever the class does; in its place: "
        "test_processor_files_survive_loading"
    ),
    "test_processor_from_and_save_pretrained_as_nested_dict": AS_ABOVE,
    "test_get_num_multimodal_tokens_matches_processor_call": (
        "its second half has two pictures in a prompt, and FUSION reads one; in its place: "
        "test_image_tokens_of_a_batch_are_counted_without_it"
    ),
}
# newer than transformers 5.17, or stricter since
NOT_APPLICABLE_SINCE_5_23 = {
    # ModelTesterMixin
    "test_training_gradient_checkpointing": (
        "it replaces a layer's checkpointed function by one mock, but a tower layer runs twice in a pass (overview, "
        "tiles), so that the first run is computed again with the second one's arguments; in its place: "
        "test_checkpointing_keeps_gradients"
    ),
    "test_training_gradient_checkpointing_use_reentrant_false": AS_ABOVE,
    # ProcessorTesterMixin
    "test_apply_chat_template_assistant_mask": (
        "its conversations have three pictures, and FUSION reads one; in its place: "
        "test_assistant_mask_of_a_conversation_with_an_image"
    ),
    "test_call_arguments_not_in_attributes": (
        "it is transformers' rule for its own new processors; ours has a default query_len that a call may replace"
    ),
}
if Version(transformers.__version__) >= Version("5.23"):
    NOT_APPLICABLE |= NOT_APPLICABLE_SINCE_5_23


class NotApplicable:
    """Skips the tests of the table; first among the base classes of a suite."""

    def setUp(self) -> None:
        super().setUp()
        self.skip_if_not_applicable()

    def skip_if_not_applicable(self) -> None:
        reason = NOT_APPLICABLE.get(self._testMethodName)
        if reason is not None:
            self.skipTest(f"cannot apply: {reason}")

"""The tests of transformers' suites that cannot apply to FUSION, by name, and why."""

NOT_APPLICABLE = {
    # ModelTesterMixin
    "test_training_gradient_checkpointing": (
        "it replaces a layer's checkpointed function by one mock, but a tower layer runs twice in a pass (overview, "
        "tiles), so that the first run is computed again with the second one's arguments; see "
        "test_checkpointing_keeps_gradients"
    ),
    "test_training_gradient_checkpointing_use_reentrant_false": "as test_training_gradient_checkpointing",
    "test_training_gradient_checkpointing_use_reentrant_true": "as test_training_gradient_checkpointing",
    "test_generation_tester_mixin_inheritance": (
        "it asks for GenerationTesterMixin, which transformers' source distribution lacks; test_generation_ground.py "
        "covers its ground"
    ),
}


class NotApplicable:
    """Skips the tests of the table; first among the base classes of a suite."""

    def setUp(self) -> None:
        super().setUp()
        self.skip_if_not_applicable()

    def skip_if_not_applicable(self) -> None:
        reason = NOT_APPLICABLE.get(self._testMethodName)
        if reason is not None:
            self.skipTest(f"cannot apply: {reason}")

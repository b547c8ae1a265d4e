"""The Hub files: configuration, model and processor, copied byte for byte into model folders."""

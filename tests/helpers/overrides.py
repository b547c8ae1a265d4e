"""What classes of this package define anew of a library's classes, which the library may rename with any release."""


def overridden(cls: type, library: str) -> set[str]:
    """Names that a class defines and that classes of `library` above it have too."""
    above = [base for base in cls.__mro__ if base.__module__.partition(".")[0] == library]
    return {name for name in vars(cls) if not is_python_s(name) and any(name in vars(base) for base in above)}


def is_python_s(name: str) -> bool:
    """Whether Python itself puts it into classes."""
    return name in ("_abc_impl", "_is_protocol") or (name.startswith("__") and name.endswith("__"))

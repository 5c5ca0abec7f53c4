# One section per Rust file of rust/py/src; the owner of the Rust file owns the section.

# lib.rs
def build_profile() -> str: ...

//! How blocks are executed: a choice of the host's, never visible to the guest.

use std::str::FromStr;

/// What runs decoded blocks. Both give the same states after the same number of instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Tier {
    /// One handler after the other: complete, on any host.
    Interpreter,
    /// Hot blocks as host code where there is a translator for this host, else as [`Tier::Interpreter`].
    #[default]
    Translator,
}

impl FromStr for Tier {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "interpreter" => Ok(Self::Interpreter),
            "translator" => Ok(Self::Translator),
            _ => Err(format!("no tier {text:?}: interpreter or translator")),
        }
    }
}

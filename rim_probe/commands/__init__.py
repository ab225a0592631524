"""The commands, a module each: flags, help texts, printing. The work is done by what they call."""

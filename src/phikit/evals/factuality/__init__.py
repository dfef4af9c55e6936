"""Is a generated radiology report true to its reference? Not for clinical use."""

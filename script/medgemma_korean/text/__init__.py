"""Pure text functions: cleaning, filters, duplicates and decontamination, without any file access."""

"""Model families, one file each, all in one order: config, attention, block, model, key map."""

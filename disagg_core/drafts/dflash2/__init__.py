"""DFlash2: DFlash with convolutions inside the block and a selector of candidates."""

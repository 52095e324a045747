"""What a step costs in memory and time: what `rewarm plan memory` runs on."""

"""Learning rates as functions of position: phases, published schedules, laws, rules of planning."""

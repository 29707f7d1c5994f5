"""Sites to a plan: the policy's rules, what a cost model foresees, what layers decide for each other."""

"""During training: another keep ratio, and schedules of it."""

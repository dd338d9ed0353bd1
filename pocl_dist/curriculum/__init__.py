"""The training scheduler (POCL section 3.2): `stages` cuts the ranking, `schedules` sets values."""

"""Everything with state: data, optimisation, disk, trackers, figures; one file a mode."""

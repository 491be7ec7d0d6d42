"""A private Ray on one machine: session, guard, directory, liveness, causes of failures."""

"""A Ray of our own on one machine: session, guard, directory, signs of life, causes of death."""

message(FATAL_ERROR "This build runs on processors like this machine's alone: configure with -DMOECTL_NATIVE=OFF, "
  "or let ./dev package do it")

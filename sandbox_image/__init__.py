"""What runs inside a cell: supervisor, zygote, sessions. Complete in itself; it imports nothing else of this project.

    pool --gRPC, Unix socket--> supervisor (PID 1; asyncio, grpcio; decides every status from waitpid and its own clock)
                                   |  socketpairs: fork; clean, files
                                zygote (numpy, scipy, sympy imported once), attendant (nothing imported: cheap forks);
                                both exec'd before any gRPC work, both single-threaded
                                   |  fork x 2, so that a session is the supervisor's own child
                                session (own uid; live interpreter; frames over a socketpair, prints over two pipes)

`build.py` and `rootfs.py` make the Docker image of it and are the only modules that are not copied into the image.
"""

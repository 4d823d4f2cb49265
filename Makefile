# What each check does stands in .ci/run, once; the targets here are its names.

FUZZTIME ?= 20s
SOAKTIME ?= 30m
DEMO     ?= 10s
export FUZZTIME SOAKTIME

.DEFAULT_GOAL := help
.PHONY: help test race fuzz stress soak mutants bench gateway-bench docs servers lint cross demo cover ci

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

test: ## all tests (go test -short ./... takes 40 s on 2 cores)
	go test ./...

race: ## all tests under the race detector
	@.ci/run race

fuzz: ## each fuzz target for FUZZTIME (20s)
	@.ci/run fuzz

stress: ## the randomised and the racing tests, many times longer
	CONNPOOL_STRESS=1 go test -race -timeout 120m -run 'Stress|Model|Desync|Race|Stolen|Thieves|Restless|ThousandAddresses|NoReplyEver|Records' ./...

soak: ## everything at random over real sockets, for SOAKTIME (30m)
	@.ci/run soak

mutants: ## each defence removed: do the tests notice? (some minutes)
	@.ci/run mutants

bench: ## this pool beside its rivals in one run, into docs/performance.md (minutes, on a quiet machine)
	cd bench && go run ./cmd/table

gateway-bench: ## the gateway beside a direct connection, HAProxy and nutcracker, into docs/gateway.md (minutes, on a quiet machine)
	cd bench && go run ./cmd/gateway

docs: ## docs/reference.md from the doc comments, docs/command.md from the help texts
	go run ./internal/reference
	page=$$(go run ./cmd/connpool help -markdown) && printf '%s\n' "$$page" >docs/command.md

servers: ## install the servers that tests run against (root, apt-get)
	@.ci/run servers

lint: ## gofmt, vet, staticcheck
	@.ci/run gofmt vet staticcheck

cross: ## build and vet for every supported system
	@.ci/run cross

demo: ## a pool at work, for DEMO (10s)
	go run ./cmd/connpool demo -for $(DEMO)

cover: ## coverage of the root package and its ground floor
	@.ci/run cover

ci: export FUZZTIME := 10s
ci: export SOAKTIME := 20s
ci: ## everything a change must pass
	@.ci/run

module github.com/seed-ecb488c9/connpool

// Go 1.24.0 compiles an atomic Or whose result is used wrongly, see docs/decisions.md.
go 1.24.1

require (
	github.com/hashicorp/golang-lru/v2 v2.0.1
	golang.org/x/sync v0.1.0
	golang.org/x/sys v0.1.0
)

require (
	github.com/davecgh/go-spew v1.1.1 // indirect
	github.com/kr/text v0.2.0 // indirect
	github.com/pmezard/go-difflib v1.0.0 // indirect
	gopkg.in/yaml.v3 v3.0.1 // indirect
)

// For tests only.
require (
	github.com/stretchr/testify v1.8.0
	go.uber.org/goleak v1.3.0
	pgregory.net/rapid v1.3.0
)

module github.com/seed-ecb488c9/connpool

go 1.24.1

require (
	github.com/hashicorp/golang-lru/v2 v2.0.7
	github.com/stretchr/testify v1.12.1
	go.uber.org/goleak v1.3.0
	golang.org/x/net v0.33.0
	golang.org/x/sync v0.7.0
	golang.org/x/sys v0.28.0
	pgregory.net/rapid v1.3.0
)

require go.yaml.in/yaml/v3 v3.0.5 // indirect

module github.com/seed-ecb488c9/connpool/adapters/netrpc

go 1.24.1

replace github.com/seed-ecb488c9/connpool => ../../

require (
	github.com/seed-ecb488c9/connpool v0.0.0
	github.com/stretchr/testify v1.12.1
)

require (
	github.com/hashicorp/golang-lru/v2 v2.0.7 // indirect
	go.uber.org/goleak v1.3.0 // indirect
	go.yaml.in/yaml/v3 v3.0.5 // indirect
	golang.org/x/sys v0.28.0 // indirect
)

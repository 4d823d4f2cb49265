module github.com/seed-ecb488c9/connpool/internal/conform

go 1.26.0

replace github.com/seed-ecb488c9/connpool => ../../

require (
	github.com/seed-ecb488c9/connpool v0.0.0
	github.com/stretchr/testify v1.12.1
	golang.org/x/net v0.62.0
)

require (
	github.com/hashicorp/golang-lru/v2 v2.0.1 // indirect
	go.uber.org/goleak v1.3.0 // indirect
	go.yaml.in/yaml/v3 v3.0.5 // indirect
	golang.org/x/sys v0.49.0 // indirect
)

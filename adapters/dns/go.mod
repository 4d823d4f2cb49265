module github.com/seed-ecb488c9/connpool/adapters/dns

go 1.25.0

replace github.com/seed-ecb488c9/connpool => ../../

require (
	github.com/miekg/dns v1.1.73
	github.com/seed-ecb488c9/connpool v0.0.0
	github.com/stretchr/testify v1.12.1
)

require (
	github.com/hashicorp/golang-lru/v2 v2.0.7 // indirect
	go.uber.org/goleak v1.3.0 // indirect
	go.yaml.in/yaml/v3 v3.0.5 // indirect
	golang.org/x/net v0.57.0 // indirect
	golang.org/x/sys v0.47.0 // indirect
)
